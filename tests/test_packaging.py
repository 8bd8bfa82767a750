"""What is shipped, what an import costs, and that the folder triton/ never is Triton."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import apollo_kernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # a compiler, where another worker has the other core


def run(*command, cwd=ROOT, **environment):
    """Stdout of a command; its output goes into the failure."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def checkout(target):
    """The tracked and new files of the tree, without what was built in place."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in files:
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(source, out, *options, **environment):
    # Without isolation: the same backend from the pinned requirements, and no network in a test.
    # CUDA as users get it; test_kernel_limits.py looks at what was installed.
    environment.setdefault("APOLLO_KERNELS_CUDA", "auto")
    command = (sys.executable, "-m", "build", "--no-isolation", *options, "-o", out, source)
    return run(*command, cwd=source.parent, **environment)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """An sdist of a clean tree and the wheel that is built from it."""
    base = tmp_path_factory.mktemp("packaging")
    build(checkout(base / "tree"), base / "dist", "--sdist")
    with tarfile.open(next((base / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(base, filter="data")
    build(base / SOURCE, base / "dist", "--wheel")
    return base / "dist"


SOURCE = f"apollo_kernels-{apollo_kernels.__version__}"  # an sdist's folder


def members(built):
    return zipfile.ZipFile(next(built.glob("*.whl"))).namelist()


def test_the_wheel_s_top_level_is_the_package_alone(built):
    top = {name.split("/")[0] for name in members(built)}
    assert top == {"apollo_kernels", "apollo_kernels-0.1.0.dist-info"}


def test_the_wheel_holds_the_native_module_the_types_and_the_licence(built):
    names = members(built)
    assert any(n.startswith("apollo_kernels/_C.") and n.endswith(".so") for n in names)
    assert "apollo_kernels/py.typed" in names
    assert "apollo_kernels/triton_kernels/step.py" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "apollo_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert any(n.startswith("apollo_kernels/as_apollo_torch/apollo_torch-") for n in names)
    (entry,) = (n for n in names if n.endswith("entry_points.txt"))
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    assert "apollo-kernels = apollo_kernels.__main__:run" in wheel.read(entry).decode()


@pytest.mark.parametrize("which", ["wheel", "installed"])  # `make test` installs it with kernels
def test_the_native_module_links_neither_torch_nor_cuda(built, which, tmp_path):
    from apollo_kernels import _C

    library = _C.__file__
    if which == "wheel":
        wheel = zipfile.ZipFile(next(built.glob("*.whl")))
        (name,) = (n for n in wheel.namelist() if "/_C." in n)
        library = wheel.extract(name, tmp_path)
    needed = run("readelf", "-d", library)
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [n for n in libraries if "torch" in n or "c10" in n or "cuda" in n or "python" in n]


def test_the_sdist_holds_everything_to_build_test_and_measure(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    for name in (
        "csrc/philox.cuh",
        "CMakeLists.txt",
        "tests/test_rule.py",
        "bench/bench_step.py",
        "triton/README.md",
        "Makefile",
        "LICENSE",
        "requirements-dev.txt",
    ):
        assert name in names


# The first bytes of ELF, PE and Mach-O files (twice, and fat ones), and of ar's archives.
COMPILED = (
    b"\x7fELF",
    b"MZ",
    b"\xcf\xfa\xed\xfe",
    b"\xce\xfa\xed\xfe",
    b"\xca\xfe\xba\xbe",
    b"!<arch>",
)


def test_the_sdist_holds_no_compiled_code(built):
    """Every file of it is text, or a picture that is one."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = [member for member in archive if member.isfile()]
        assert len(files) > 100
        for member in files:
            data = archive.extractfile(member).read()
            assert not data.startswith(COMPILED), member.name
            if member.name.endswith(".png"):
                assert data.startswith(b"\x89PNG\r\n"), member.name
            else:
                data.decode()  # raises for what is no text


def test_a_second_build_compiles_nothing(built, tmp_path):
    output = build(built.parent / SOURCE, tmp_path, "--wheel")
    assert "ninja: no work to do" in output


# A torch that the build can see says by its version.py for what it was built; it is never imported.
TORCH = "raise RuntimeError('imported')"
CUDA_TORCH = (
    "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
)
CPU_TORCH = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
ROCM_TORCH = (
    "__version__ = '2.13.0+rocm7'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0'\n"
)


@pytest.mark.parametrize(
    "torch, asked, chosen, why",
    [
        (CUDA_TORCH, "auto", "nvcc", "torch 2.13.0+cu130 at build time was a build for CUDA 13.0"),
        (CUDA_TORCH, "", "nvcc", "torch 2.13.0+cu130 at build time was a build for CUDA 13.0"),
        (CPU_TORCH, "auto", "off", "torch 2.13.0+cpu at build time was no CUDA build"),
        (ROCM_TORCH, "auto", "off", "torch 2.13.0+rocm7 at build time was no CUDA build"),
        (CPU_TORCH, "on", "on", "APOLLO_KERNELS_CUDA=on"),
        (CPU_TORCH, "nvcc", "nvcc", "APOLLO_KERNELS_CUDA=nvcc"),
        (CUDA_TORCH, "off", "off", "APOLLO_KERNELS_CUDA=off"),
        (None, "auto", "off", "neither torch nor an NVIDIA driver was seen"),
    ],
)
def test_cuda_is_compiled_where_the_environment_s_torch_can_use_it(
    torch, asked, chosen, why, tmp_path
):
    if torch is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text(TORCH)
        (tmp_path / "torch/version.py").write_text(torch)
    code = f"import sys, setuptools; sys.path = [{str(tmp_path)!r}, *sys.path]\n"
    code += "setuptools.setup = lambda **_: None; import runpy\n"
    code += f"made = runpy.run_path({str(ROOT / 'setup.py')!r})\n"
    if torch is None:  # nothing of this machine
        code += "make = made['choose_cuda'].__globals__\n"
        code += "make['folder_of_torch'] = lambda: None; make['has_driver'] = lambda: False\n"
    code += "print(*made['choose_cuda'](), sep='|')"
    out = run(sys.executable, "-c", code, APOLLO_KERNELS_CUDA=asked)
    found, reason = out.strip().split("|")
    assert (found, reason[: len(why)]) == (chosen, why)


def test_an_isolated_build_sees_the_torch_of_the_environment_that_it_installs_into(tmp_path):
    """pip hides it by PYTHONPATH and a sitecustomize; the interpreter is the user's."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    code = "import runpy, sys, types\n"
    code += "import importlib.util; assert importlib.util.find_spec('torch') is None\n"
    code += "stand = types.ModuleType('setuptools')\n"
    code += "stand.Extension = stand.setup = lambda *a, **k: 0\n"
    code += "command = types.ModuleType('b'); command.build_ext = object\n"
    code += "sys.modules.update({'setuptools': stand, 'setuptools.command.build_ext': command,\n"
    code += "                    'setuptools.command': types.ModuleType('c')})\n"
    code += f"print(runpy.run_path({str(ROOT / 'setup.py')!r})['folder_of_torch']())"
    out = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).strip()
    import torch

    assert Path(out) == Path(torch.__file__).parent


@pytest.mark.parametrize("name", ["APOLLO_KERNELS_CUDA", "APOLLO_KERNELS_NATIVE"])
def test_a_misspelled_choice_is_an_error(name, tmp_path):
    with pytest.raises(AssertionError, match=f"{name}='yes': want one of auto, on, off"):
        build(checkout(tmp_path / "tree"), tmp_path / "dist", "--wheel", **{name: "yes"})


def test_nvcc_may_be_named_by_its_file(tmp_path):
    """CUDACXX is a file to CMake; a folder, as CUDA_HOME is, is searched."""
    nvcc = tmp_path / "our-nvcc"
    nvcc.write_text('#!/bin/sh\ntouch "$0.was-asked"; exit 1\n')
    nvcc.chmod(0o755)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DAPOLLO_KERNELS_CUDA=on"]
    environment = {**os.environ, "CUDACXX": str(nvcc), "CUDA_HOME": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and Path(f"{nvcc}.was-asked").exists(), done.stderr


def test_a_wheel_keeps_why_its_cuda_kernels_are_there_or_not(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    assert "at build time" in wheel.read("apollo_kernels/_cuda_why.txt").decode()
    assert "apollo_kernels/_no_native.txt" not in wheel.namelist()


def test_a_checkout_without_symbolic_links_builds_the_same_package(tmp_path):
    """As Windows makes it: a text file with the path stands where the link should be."""
    tree = checkout(tmp_path / "tree")
    link = tree / "apollo_kernels" / "triton_kernels"
    link.unlink()
    link.write_text("../triton")
    build(tree, tmp_path / "dist", "--wheel", APOLLO_KERNELS_NATIVE="off")
    names = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))).namelist()
    assert "apollo_kernels/triton_kernels/step.py" in names
    assert "apollo_kernels/triton_kernels" not in names


def test_without_a_compiler_the_package_builds_and_says_what_is_missing(tmp_path):
    tree = checkout(tmp_path / "tree")
    build(tree, tmp_path / "dist", "--wheel", CXX="/no/such/compiler")
    wheel = zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl")))
    assert not any("/_C." in n for n in wheel.namelist())
    assert "native build failed" in wheel.read("apollo_kernels/_no_native.txt").decode()
    assert "apollo_kernels/_cuda_why.txt" not in wheel.namelist()
    wheel.extractall(tmp_path / "site")
    # the editable install's finders would answer first
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    code += f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    code += "from apollo_kernels import __main__, philox, projection_matrix\n"
    code += "print(philox._C, projection_matrix(0, 0, 2, 3).shape); __main__.main(['info'])"
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.startswith("None torch.Size([2, 3])")
    assert "native module   no: the native build failed" in out


def test_demanding_the_native_module_makes_a_failed_build_an_error(tmp_path):
    tree = checkout(tmp_path / "tree")
    with pytest.raises(AssertionError, match="returned non-zero exit status"):
        build(
            tree, tmp_path / "dist", "--wheel", CXX="/no/such/compiler", APOLLO_KERNELS_NATIVE="on"
        )


# A finder that hides an installed Triton but not a mere folder of that name.
HIDE_TRITON = """
import importlib.machinery, sys
class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        return None if name == "triton" and spec is not None and spec.origin else spec
    @classmethod
    def invalidate_caches(cls): pass
sys.meta_path = [Hide if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def test_the_folder_would_pose_as_triton_without_the_guard():
    """The trap is real: if this fails, the guard may go."""
    code = "import os, sys; sys.path = ['', *[p for p in sys.path if 'site-packages' not in p]]\n"
    code += "import triton; print(triton.__file__)"
    assert run(sys.executable, "-c", code).strip() == "None"


def test_an_optimizer_can_be_built_from_the_root_without_triton():
    code = HIDE_TRITON + "import apollo_kernels, torch\n"
    code += "torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])\n"
    code += "try: import triton\nexcept ModuleNotFoundError: print('absent')"
    assert run(sys.executable, "-c", code).strip() == "absent"


def test_an_installed_triton_is_left_alone(tmp_path):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n"  # after the root, on purpose
    code += "import apollo_kernels, triton; print(triton.real, triton.__file__)"
    env = {"PYTHONPATH": ""}
    out = run(sys.executable, "-c", HIDE_INSTALLED.format(keep=str(tmp_path)) + code, **env)
    assert out.strip() == f"True {package / '__init__.py'}"


# Hides only a Triton of site-packages, so that the stand-in on a later path is found.
HIDE_INSTALLED = """
import sys, importlib.machinery
_find = importlib.machinery.PathFinder.find_spec
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "triton":
            path = [p for p in sys.path if "site-packages" not in p]
        return _find(name, path, target)
    @classmethod
    def invalidate_caches(cls): pass
sys.meta_path = [Only if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def test_import_is_light():
    """No transformers, bitsandbytes, compiler, DTensor or CUDA context: few and light modules."""
    code = "import sys, torch; before = set(sys.modules); import apollo_kernels\n"
    code += "new = {m for m in set(sys.modules) - before if sys.modules[m] is not None}\n"
    code += "print(len(new), *sorted(new))\n"
    code += "assert not torch.cuda.is_initialized()"
    count, *new = run(sys.executable, "-c", code).split()
    heavy = ("transformers", "bitsandbytes", "triton", "numpy", "torch._dynamo", "torch._inductor")
    heavy += ("torch.distributed.tensor", "torch.distributed.checkpoint")
    assert not [m for m in new if m.startswith(heavy)]
    assert int(count) < 40


def test_the_version_is_stated_once():
    import apollo_kernels
    from apollo_kernels import philox

    assert philox._C.build_info()["version"] == apollo_kernels.__version__
