"""Maps the top-level folders to one import package (kernels/ is divisi.kernels); compiles C++ kernels into wheels."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDERS = ("kernels", "model", "cluster", "deploy", "benchmarks")
patterns = [pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
found = find_namespace_packages(include=patterns, exclude=["*.divisi-demo"])  # a checkpoint, no package


def compiles_kernels() -> bool:
    """Whether this machine can compile what a wheel brings along. Without, kernels are compiled at first use."""
    return platform.machine() == "x86_64" and shutil.which("g++") is not None


class BuildWithKernels(build_py):
    """The packages, and of the C++ kernels every build for x86-64; an editable installation compiles its own later."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        library = Path(self.build_lib).resolve()
        into = library / "divisi/kernels/native/built"
        shutil.rmtree(into, ignore_errors=True)  # an earlier build's, of other sources
        if not compiles_kernels():
            self.warn("no g++ for x86-64: this wheel holds no C++ kernels, which are then compiled where it runs")
            return
        with TemporaryDirectory() as scratch:
            command = [sys.executable, "-P", "-m", "divisi.kernels.native", scratch]
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(library)}, cwd=scratch, check=True)
            into.mkdir()
            for file in Path(scratch).glob("*.so"):
                shutil.copy(file, into)


class WheelOfAnyPython(bdist_wheel):
    """For any Python, of which the C++ kernels know nothing, though for one kind of processor where it holds these."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, processor = super().get_tag()
        return "py3", "none", processor


class WithKernels(Distribution):
    """Not for every processor where a wheel of it holds kernels."""

    def has_ext_modules(self) -> bool:
        return compiles_kernels()


setup(
    packages=[f"divisi.{name}" for name in found],
    package_dir={f"divisi.{name}": name for name in FOLDERS},
    distclass=WithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfAnyPython},
)
