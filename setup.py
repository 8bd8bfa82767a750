"""Drives CMakeLists.txt. Without a C++ compiler the package is pure Python, and says so.

APOLLO_KERNELS_CUDA=auto|on|off, APOLLO_KERNELS_NATIVE=auto|on|off (on: a failed build is an error).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'"(.+)"', (ROOT / "apollo_kernels/_version.py").read_text()).group(1)


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        native = os.environ.get("APOLLO_KERNELS_NATIVE", "auto")
        if native == "off":
            return self.without(target, "APOLLO_KERNELS_NATIVE=off at build time")
        try:
            self.cmake(target)
        except (subprocess.CalledProcessError, OSError, ImportError) as error:
            if native == "on" or os.environ.get("APOLLO_KERNELS_CUDA") == "on":
                raise
            return self.without(target, f"the native build failed ({error})")
        self.reason_file(target).unlink(missing_ok=True)

    def cmake(self, target):
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-DAPOLLO_KERNELS_VERSION={VERSION}",
            f"-DAPOLLO_KERNELS_CUDA={os.environ.get('APOLLO_KERNELS_CUDA', 'auto')}",
        ]  # fmt: skip
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])], check=True
        )

    def reason_file(self, target):
        return target.parent / "_no_native.txt"

    def without(self, target, reason):
        print(f"apollo_kernels: no native module: {reason}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.reason_file(target).write_text(reason + "\n")  # for `python -m apollo_kernels info`

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):  # pip install -e
        for extension in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(
                self.get_ext_fullname(extension.name)
            )
            for path in (built, self.reason_file(built)):
                old = ROOT / "apollo_kernels" / path.name
                old.unlink(missing_ok=True)  # a stale module of an earlier, luckier build
                if path.exists():
                    self.copy_file(str(path), str(old))


setup(
    packages=[
        "apollo_kernels",
        "apollo_kernels.commands",
        "apollo_kernels.as_apollo_torch",  # a folder for sys.path, see standin.py
        "apollo_kernels.integrations",
        "apollo_kernels.triton_kernels",
    ],
    package_data={
        "apollo_kernels": ["py.typed"],
        "apollo_kernels.as_apollo_torch": ["*.dist-info/METADATA"],
    },
    ext_modules=[Extension("apollo_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
