"""Drives CMakeLists.txt. Without a C++ compiler the package is pure Python, and says so.

APOLLO_KERNELS_CUDA=auto|on|off|nvcc says whether CUDA kernels are compiled, which takes minutes:

    auto    (the default) where nvcc is, if the environment's torch is a CUDA build; where no torch
            can be seen (``python -m build`` hides it), if the machine has an NVIDIA driver
    on      always; without nvcc the build fails
    off     never
    nvcc    wherever nvcc is, whatever torch is: for developers, whose tests read what nvcc makes

APOLLO_KERNELS_NATIVE=auto|on|off: with on, a failed native build is an error. What was decided, and
why, is printed (pip shows it with -v) and kept for ``python -m apollo_kernels info``.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'"(.+)"', (ROOT / "apollo_kernels/_version.py").read_text()).group(1)
REMEDY = " (APOLLO_KERNELS_CUDA=on compiles them all the same)"
CUDA_CHOICES = ("auto", "on", "off", "nvcc")
NATIVE_CHOICES = ("auto", "on", "off")
# What CMake reads from the environment and keeps: another value wants another folder.
COMPILERS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME", "CUDAFLAGS")
COMPILERS += ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "ARCHFLAGS", "MACOSX_DEPLOYMENT_TARGET")


def say(text):
    print(f"apollo_kernels: {text}", file=sys.stderr, flush=True)


def folder_of_torch():
    """Where the environment keeps torch, or None; nothing is imported.

    pip builds in isolation, but with the interpreter of the environment that it installs into.
    Asked without PYTHONPATH, which is what isolates, that interpreter finds the user's torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
    asked = subprocess.run(
        [sys.executable, "-E", "-c", code], cwd=sys.prefix, capture_output=True, text=True
    )
    origin = asked.stdout.strip()
    return Path(origin).parent if origin else None


def has_driver():
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def choice(name, known):
    asked = os.environ.get(name) or "auto"
    if asked not in known:
        raise SystemExit(f"{name}={asked!r}: want one of {', '.join(known)}")
    return asked


def choose_cuda():
    """(what CMake is told: on, off or nvcc; why)."""
    asked = choice("APOLLO_KERNELS_CUDA", CUDA_CHOICES)
    if asked != "auto":
        return asked, f"APOLLO_KERNELS_CUDA={asked} at build time"
    if not sys.platform.startswith("linux"):
        return "off", "they are built on Linux only"
    torch = folder_of_torch()
    if torch is None:
        if has_driver():
            return "nvcc", "no torch was seen at build time, but an NVIDIA driver"
        return "off", "neither torch nor an NVIDIA driver was seen at build time" + REMEDY
    text = (torch / "version.py").read_text()
    version = re.search(r"^__version__.*?['\"](.+?)['\"]", text, re.MULTILINE).group(1)
    cuda = re.search(r"^cuda\b.*?=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    if cuda:
        return "nvcc", f"torch {version} at build time was a build for CUDA {cuda.group(1)}"
    return "off", f"torch {version} at build time was no CUDA build" + REMEDY


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        native = choice("APOLLO_KERNELS_NATIVE", NATIVE_CHOICES)
        if native == "off":
            return self.without(target, "APOLLO_KERNELS_NATIVE=off at build time")
        cuda, why = choose_cuda()
        say(f"CUDA kernels: {dict(on='yes', off='no', nvcc='if nvcc is found')[cuda]}: {why}")
        try:
            self.cmake(target, cuda, why)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if native == "on" or cuda == "on":
                raise
            return self.without(target, f"the native build failed ({error})")
        native_reason, cuda_reason = self.reason_files(target)
        native_reason.unlink(missing_ok=True)
        cuda_reason.write_text(why + "\n")

    def cmake(self, target, cuda, why):
        """Builds in build/cmake/, in a folder for these settings that the next build finds."""
        settings = [
            "-DCMAKE_BUILD_TYPE=Release", f"-DAPOLLO_KERNELS_VERSION={VERSION}",
            f"-DAPOLLO_KERNELS_CUDA={cuda}", f"-DAPOLLO_KERNELS_CUDA_WHY={why}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            settings.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        # Visual Studio's generator finds its compiler by itself, Ninja only in its command prompt.
        ninja = shutil.which("ninja") if sys.platform != "win32" or shutil.which("cl") else None
        if ninja:
            settings += ["-G", "Ninja"]
        known = [*settings, *(f"{name}={os.environ.get(name)}" for name in COMPILERS)]
        digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
        build = ROOT / "build" / "cmake" / f"{sysconfig.get_config_var('SOABI')}-{digest}"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), *settings]
        configure.append(f"-Dpybind11_DIR={self.pybind11(build)}")
        if ninja:  # it lies in another folder at each isolated build
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        out = build / "out"
        configure += [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY{kind}={out.as_posix()}" for kind in ("", "_RELEASE")
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--config", "Release", *jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(out / target.name, target)

    def pybind11(self, build):
        """pybind11's CMake folder, in a copy that outlives an isolated environment.

        Compilers are handed the same path by the next build then, and ninja has nothing to do.
        """
        import pybind11

        copied = build / f"pybind11-{pybind11.__version__}"
        if not copied.exists():
            partly = copied.with_suffix(".part")
            shutil.rmtree(partly, ignore_errors=True)
            shutil.copytree(Path(pybind11.__file__).parent, partly)
            partly.rename(copied)
        return (copied / "share" / "cmake" / "pybind11").as_posix()

    def reason_files(self, target):
        """For ``python -m apollo_kernels info``: why there is no native module; or, beside one, why
        CUDA kernels were asked for or not."""
        return target.parent / "_no_native.txt", target.parent / "_cuda_why.txt"

    def without(self, target, reason):
        say(f"no native module: {reason}")
        target.parent.mkdir(parents=True, exist_ok=True)
        native_reason, cuda_reason = self.reason_files(target)
        native_reason.write_text(reason + "\n")
        cuda_reason.unlink(missing_ok=True)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):  # pip install -e
        for extension in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(
                self.get_ext_fullname(extension.name)
            )
            for path in (built, *self.reason_files(built)):
                old = ROOT / "apollo_kernels" / path.name
                old.unlink(missing_ok=True)  # a stale module of an earlier, luckier build
                if path.exists():
                    self.copy_file(str(path), str(old))


# A checkout without symbolic links (Windows' default) has a text file where the link should be.
linked = (ROOT / "apollo_kernels" / "triton_kernels").is_dir()
setup(
    packages=[
        "apollo_kernels",
        "apollo_kernels.commands",
        "apollo_kernels.as_apollo_torch",  # a folder for sys.path, see standin.py
        "apollo_kernels.integrations",
        "apollo_kernels.triton_kernels",
    ],
    package_dir={} if linked else {"apollo_kernels.triton_kernels": "triton"},
    package_data={
        "apollo_kernels": ["py.typed"],
        "apollo_kernels.as_apollo_torch": ["*.dist-info/METADATA"],
    },
    ext_modules=[Extension("apollo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
