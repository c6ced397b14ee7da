"""Class names of the tasks, in the order of their labels, from the cards of their datasets on the Hugging Face hub.

A card is a few kilobytes; no images are fetched. Look through the files: these names go into the prompts.

    python examples/clip_vit_b32/get_class_names.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

DATASETS = {
    "sun397": "tanganke/sun397",
    "cars": "tanganke/stanford_cars",
    "resisc45": "tanganke/resisc45",
    "eurosat": "tanganke/eurosat",
    "gtsrb": "tanganke/gtsrb",
    "dtd": "tanganke/dtd",
}


def names_from_card(text: str) -> list[str]:
    """The names of the first feature with class labels, in the card's front matter."""
    front = yaml.safe_load(text.split("---")[1])
    info: Any = front["dataset_info"]
    for feature in (info[0] if isinstance(info, list) else info)["features"]:
        label = feature["dtype"]["class_label"] if isinstance(feature["dtype"], dict) else None
        if label:
            names = {int(index): str(name) for index, name in label["names"].items()}
            return [names[index].replace("_", " ").strip() for index in sorted(names)]
    raise ValueError("the card names no classes")


def main() -> None:
    """Write classes/TASK.txt for every dataset."""
    directory = Path(__file__).parent / "classes"
    directory.mkdir(exist_ok=True)
    for task, dataset in DATASETS.items():
        card = Path(hf_hub_download(dataset, "README.md", repo_type="dataset"))
        names = names_from_card(card.read_text(encoding="utf-8"))
        (directory / f"{task}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        print(f"{task}: {len(names)} classes, {names[0]} to {names[-1]}")


if __name__ == "__main__":
    main()
