"""What SECURITY.md promises: no unrestricted unpickling, no shared folders, pinned actions."""

import ast
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for folder in ("apollo_kernels", "triton", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
# What may unpickle anything: the name there that has to be true, and what a user says for it.
OPT_INS = {
    "apollo_kernels/converters.py": ("allow_unsafe_pickle", "allow_unsafe_pickle=True"),
    "apollo_kernels/commands/convert.py": ("unsafe", "--allow-unsafe-pickle"),
}
NUMBERS = {1: "There is one exception", 2: "There are two exceptions"}


def calls(path):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unrestricted(path):
    """Calls that load a file or a string with anything but weights_only=True."""
    found = []
    for name, call in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        loads = name == "torch.load" and keywords.get("weights_only") != "True"
        if loads or re.fullmatch(r"(c?pickle|dill|joblib|marshal|shelve)\.(loads?|open)", name):
            found.append(call)
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_unpickled_but_by_a_named_opt_in(path):
    opt_in, _ = OPT_INS.get(path.relative_to(ROOT).as_posix(), (None, None))
    guarded = {
        (call.lineno, call.col_offset)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and opt_in and ast.unparse(node.test) == opt_in
        for part in node.body
        for call in ast.walk(part)
        if isinstance(call, ast.Call)
    }
    assert [c.lineno for c in unrestricted(path) if (c.lineno, c.col_offset) not in guarded] == []


def test_the_page_names_each_opt_in_and_counts_them():
    page = (ROOT / "SECURITY.md").read_text()
    (text,) = re.findall(r"\* \*\*Checkpoints\.\*\*.*?(?=^\* )", page, re.MULTILINE | re.DOTALL)
    for path, (_, said) in OPT_INS.items():
        assert f"{said}`" in text or f"{said})`" in text, path
    assert NUMBERS[len(OPT_INS)] in text


def test_the_opt_in_of_the_package_is_off_unless_it_is_said():
    from apollo_kernels import load_apollo_torch

    assert inspect.signature(load_apollo_torch).parameters["allow_unsafe_pickle"].default is False


def test_the_package_compiles_nothing_and_keeps_no_files_in_temporary_folders():
    for path in sorted((ROOT / "apollo_kernels").rglob("*.py")):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not imported & {"tempfile", "torch.utils.cpp_extension"}, path
        for name, call in calls(path):
            if "CDLL" in name:  # the C library alone, for its allocator's settings
                assert ast.unparse(call.args[0]) == "'libc.so.6'", (path, call.lineno)


@pytest.mark.parametrize("folder", ["apollo_kernels", "tests", "bench", "examples", "triton"])
def test_temporary_folders_are_private_ones(folder):
    """mkdtemp and its kin make folders of mode 700; a fixed name under /tmp is anybody's."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name, call in calls(path):
            assert name not in ("tempfile.mktemp", "tempfile.gettempdir"), (path, call.lineno)
            assert "cpp_extension" not in name and name != "load_inline", (path, call.lineno)
        if path.name != Path(__file__).name:
            assert not re.search(r"""["'](/var)?/tmp/""", path.read_text()), path


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version_beside(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*-?\s*uses:", line)]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")
def test_one_action_has_one_commit_everywhere():
    pins = {}
    for path in WORKFLOWS:
        for action, commit in re.findall(r"uses: ([\w./-]+)@(\w+)", path.read_text()):
            pins.setdefault(action, set()).add(commit)
    assert {action: commits for action, commits in pins.items() if len(commits) > 1} == {}


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")
def test_only_the_upload_may_prove_an_identity_and_nothing_may_write():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    head, publish = text.split("  publish:\n")
    assert ": write" not in head
    assert re.findall(r"^ +[\w-]+: write", publish, re.MULTILINE) == ["      id-token: write"]
    assert "secrets." not in text and "password" not in text
