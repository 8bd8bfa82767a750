"""CONTRIBUTING.md tells truly which files a new dtype and a new distribution touch."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("apollo_kernels", "csrc", "triton")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
]


def bullet(title):
    """The text of one point of the list."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^- \*\*{title}.*?(?=^- |^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group()


def mentioning(pattern):
    return {s for s in SOURCES if re.search(pattern, (ROOT / s).read_text(), re.IGNORECASE)}


@pytest.mark.parametrize(
    "title, pattern",
    [
        ("A new dtype", r"\b(?<!b)k?float16\b"),  # bfloat16 is everywhere that bf16 is special
        ("A new distribution", "rademacher"),
    ],
)
def test_the_list_names_every_file_that_knows_of_one(title, pattern):
    named = set(re.findall(r"`((?:apollo_kernels|csrc|triton)/[\w./]+)`", bullet(title)))
    assert named == mentioning(pattern)


@pytest.mark.parametrize("title", ["A new dtype", "A new weight format", "A new distribution"])
def test_every_name_stands_in_the_file_that_is_said_to_have_it(title):
    text = bullet(title)
    pairs = re.findall(r"`(\w+)`\s+in\s+`([\w./]+)`", text)
    assert pairs
    for name, path in pairs:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), (name, path)
