"""Builds the kernels for the emulated device (cuda_on_cpu) and puts it behind backend="cuda"."""

import contextlib
import fcntl
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "cuda_on_cpu"
SOURCES = [ROOT / "csrc" / name for name in ("launch.cu", "plan.cpp", "kernel_bindings.cpp")]
SOURCES += [FOLDER / name for name in ("module.cpp", "emulated_device.cpp")]


def why_not():
    """Why the emulated device cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if sysconfig.get_platform() != "linux-x86_64":
        return f"switches stacks on x86-64 Linux only, not on {sysconfig.get_platform()}"
    return None


def _is_current(target):
    """Whether an object is newer than everything that it was made of (as g++ -MMD has listed)."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    _, _, sources = listed.read_text().replace("\\\n", " ").partition(":")
    made = target.stat().st_mtime
    paths = [ROOT / source for source in sources.split()]
    return all(path.exists() and path.stat().st_mtime < made for path in paths)


def build(name="plain", flags=("-O2",), defines=()):
    """The module's path; what is older than its sources is built again. Two pytest workers may ask
    at once."""
    import pybind11

    out = ROOT / "build" / "emulated" / name / "apollo_emulated.so"
    out.parent.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for folder in (ROOT / "csrc", FOLDER) for p in folder.iterdir())
    with (out.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists() and out.stat().st_mtime > newest:
            return out
        common = [
            "g++", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall",
            "-Wextra", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers", "-MMD",
            "-DAPOLLO_EMULATED", *defines, *flags, f"-I{FOLDER.relative_to(ROOT)}",
            f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
        ]  # fmt: skip
        objects, running = [], []
        for source in SOURCES:
            target = out.parent / (source.name + ".o")
            objects.append(str(target))
            if not _is_current(target):  # paths from ROOT on, so that a copy lists its own
                path = str(source.relative_to(ROOT))
                command = [*common, "-x", "c++", "-c", path, "-o", str(target)]
                running.append(subprocess.Popen(command, cwd=ROOT))
        failed = [p.args for p in running if p.wait() != 0]
        assert not failed, failed
        subprocess.run(
            ["g++", "-shared", *flags, *objects, "-o", str(out), "-lpthread"], check=True
        )
    return out


def load(path):
    spec = importlib.util.spec_from_file_location("apollo_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def device(module):
    """Within it, ``backend="cuda"`` runs on CPU tensors, over the emulated device."""
    from apollo_kernels import cuda

    before = cuda.kernels, cuda.kernel_device
    cuda.kernels, cuda.kernel_device = module, "cpu"
    try:
        yield
    finally:
        cuda.kernels, cuda.kernel_device = before
