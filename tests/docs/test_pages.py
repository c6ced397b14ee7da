"""The documentation's links lead somewhere, its recipes have known keys, and the errors that it explains exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from mass_export import recipe

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *(ROOT / "examples").glob("*/*.md"),
            *(ROOT / "deploy").rglob("*.md"),
        ]
    )
}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors_of(page):
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = [name.lower().strip() for name in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", name).replace(" ", "-") for name in names}


@pytest.mark.parametrize("name", PAGES)
def test_every_local_link_leads_to_a_file_and_to_a_heading_there(name):
    page = PAGES[name]
    lost = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            lost.append(target)
    assert not lost


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {target for target in LINK.findall(index) if "/" not in target and ".md" in target} == pages


RECIPES = [
    (name, text)
    for name, page in PAGES.items()
    for text in re.findall(
        r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    if "tasks:" in text
]


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes_have_no_key_that_is_unknown(name, text):
    parsed = yaml.safe_load(text)
    assert set(parsed) <= set(recipe._TOP_KEYS), name
    for task in parsed["tasks"]:
        assert set(task) <= set(recipe._TASK_KEYS), name


def texts_of_the_code():
    """Every text in the sources, with `..` for what is filled in."""
    for path in sorted([*(ROOT / "mass_export").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else ".." for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


FAQ = PAGES["docs/faq.md"].read_text(encoding="utf-8")
MESSAGES = [
    message
    for table in re.findall(r"^\| message \|.*?\n\n", FAQ, re.MULTILINE | re.DOTALL)
    for message in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
]


@pytest.fixture(scope="module")
def code_texts():
    return list(texts_of_the_code())


@pytest.mark.parametrize("message", MESSAGES)
def test_an_error_that_is_explained_is_one_of_the_code(message, code_texts):
    wanted = re.compile(".*".join(re.escape(part.strip()) for part in message.split("..")))
    assert any(wanted.search(text) for text in code_texts)
