"""Every Python block of README.md and docs/ runs, as it stands there.

The blocks of a page run one after the other in one namespace, which docs_prelude.py begins. A block
after the comment ``<!-- needs: PACKAGE ... -->`` runs by itself, and is skipped where one of the
packages is absent.
"""

import ast
import importlib.util
import re
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import docs_prelude
import pytest

from apollo_kernels import APOLLO, __main__, estimate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[\w. ]+) -->\n+)?"
    r"(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    page: str
    line: int  # of its first line of code
    code: str
    needs: tuple[str, ...]


def blocks_of(page):
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        code = textwrap.dedent(match["code"])
        needs = tuple((match["needs"] or "").split())
        found.append(Block(page.relative_to(ROOT).as_posix(), line, code, needs))
    return found


ALONE = [b for page in PAGES for b in blocks_of(page) if b.needs]
TOGETHER = {page: [b for b in blocks_of(page) if not b.needs] for page in PAGES}


def run(block, namespace):
    """A traceback of it shows the page and the line there."""
    source = "\n" * (block.line - 1) + block.code
    exec(compile(source, str(ROOT / block.page), "exec"), namespace)


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"__name__": "__docs__", **docs_prelude.names()}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if TOGETHER[p]], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_blocks_of_a_page_run_in_order(page, namespace):
    for block in TOGETHER[page]:
        run(block, namespace)


@pytest.mark.parametrize("block", ALONE, ids=lambda b: f"{b.page}:{b.line}")
def test_a_block_that_needs_a_package_runs_where_it_is(block, namespace):
    absent = [name for name in block.needs if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what those packages warn of is theirs
        run(block, namespace)


def test_no_block_is_overlooked():
    """One that the pattern above does not find would never run."""
    for page in PAGES:
        fences = re.findall(r"^\s*(?:```|~~~)\s*\{?\.?py", page.read_text(), re.MULTILINE)
        assert len(fences) == len(blocks_of(page)), page


def test_the_figures_of_8b_on_24_gb_are_the_estimate_s():
    page = (ROOT / "docs/8b-on-24gb.md").read_text()
    for sequence, modes in {
        256: [
            "AdamW, float32 moments", "APOLLO-Mini", "APOLLO-Mini, gradient release, embeddings",
            "Q-APOLLO-Mini, gradient release",
        ],
        2048: ["APOLLO-Mini, gradient release, embeddings"],
    }.items():  # fmt: skip
        found = estimate.estimate("8b", batch=1, sequence=sequence, checkpointing=[True])
        by_mode = {e.mode: e for e in found}
        for mode in modes:
            e = by_mode[mode]
            assert f"{e.peak / 1e9:.1f}" in page, mode
            if sequence == 256:
                assert f"{e.weights / 1e9:.1f} + {e.state / 1e9:.2f}" in page, mode


def test_the_page_of_the_command_line_has_every_command():
    page = (ROOT / "docs/command-line.md").read_text()
    named = re.findall(r"^\| `([a-z]+)[ `]", page, re.MULTILINE)
    assert sorted(named) == sorted(command.name for command in __main__.COMMANDS)


def sections():
    """(file, heading) of every section of a docstring: a word alone, and lines indented below."""
    for path in sorted((ROOT / "apollo_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                for heading in re.findall(r"^([A-Z][a-z]+)\n {4}", text, re.MULTILINE):
                    yield path.name, heading


def test_the_api_pages_know_every_section_of_a_docstring():
    text = (ROOT / "docs/docstrings.py").read_text()
    known = ast.literal_eval(re.search(r"^SECTIONS = (.*)$", text, re.MULTILINE)[1])
    found = list(sections())
    assert {heading for _, heading in found} == set(known), found


def test_the_api_page_has_every_public_member_of_the_optimizer():
    page = (ROOT / "docs/api.md").read_text()
    named = re.search(r"APOLLO\n    options:\n      members: \[(.*)\]", page)[1].split(", ")
    public = {n for n in vars(APOLLO) if not n.startswith("_")}
    assert sorted(named) == sorted(public - {"profile_hook_step"})  # that torch puts there
