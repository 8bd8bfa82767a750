"""What SECURITY.md promises: no unrestricted unpickling, no shared folders, pinned actions."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for folder in ("apollo_kernels", "triton", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
# The one place that may unpickle anything, behind allow_unsafe_pickle=True.
UNSAFE = {"apollo_kernels/converters.py"}


def calls(path):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unrestricted(path):
    """Lines that load a file or a string with anything but weights_only=True."""
    found = []
    for name, call in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        loads = name == "torch.load" and keywords.get("weights_only") != "True"
        if loads or re.fullmatch(r"(c?pickle|dill|joblib|marshal|shelve)\.(loads?|open)", name):
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_unpickled_but_by_the_named_opt_in(path):
    if path.relative_to(ROOT).as_posix() not in UNSAFE:
        assert unrestricted(path) == []


def test_the_opt_in_is_the_only_unrestricted_load_of_its_file_and_is_guarded():
    (line,) = unrestricted(ROOT / "apollo_kernels/converters.py")
    before = (ROOT / "apollo_kernels/converters.py").read_text().splitlines()[:line]
    assert any("if allow_unsafe_pickle:" in text for text in before[-4:])


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
        assert not imported & {"tempfile", "ctypes", "torch.utils.cpp_extension"}, path


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
