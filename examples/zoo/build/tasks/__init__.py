"""The ten tasks of the zoo: one recipe a module, `build(sources) -> TaskArrays`."""

from __future__ import annotations

from importlib import import_module

from ..arrays import TaskArrays
from ..downloads import Sources

TASKS = ("mnist", "fashion", "animals", "letters", "icons", "flags", "planets", "sprites", "cards", "emoji")


def build_task(task: str, sources: Sources) -> TaskArrays:
    """Builds one task's arrays from its packages, which are fetched if they are not in the cache."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    recipe = import_module(f".{task}", __name__)
    arrays: TaskArrays = recipe.build(sources)
    return arrays
