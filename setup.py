"""Maps the top-level folders to one import package: kernels/ is divisi.kernels, and so on."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "model", "cluster", "deploy", "benchmarks")
patterns = [pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
found = find_namespace_packages(include=patterns, exclude=["*.divisi-demo"])  # a checkpoint, no package

setup(
    packages=[f"divisi.{name}" for name in found],
    package_dir={f"divisi.{name}": name for name in FOLDERS},
)
