"""The wheel holds everything, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from divisi.kernels.native.build import file_name
from divisi.kernels.native.variants import VARIANTS, runnable_variants

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "model", "cluster", "deploy", "benchmarks")
DATA = {".py", ".yaml", ".cfg", ".conf", ".service", ".txt", ".jinja", ".cpp", ".h", ".typed", ".json", ".safetensors"}

COMPILED = "divisi/kernels/native/built/"

pytestmark = [pytest.mark.verify, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With C++ kernels, since there is a g++."""
    return built(tmp_path_factory.mktemp("source"))


def built(folder: Path, **variables: str) -> Path:
    """Built from a copy, so that neither an old build folder nor an editable install has a part in it."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def test_it_holds_every_source_and_data_file(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"divisi/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in DATA and "__pycache__" not in path.parts
    } | {f"divisi/{folder}/py.typed" for folder in FOLDERS}
    assert expected - packed == set()
    assert not [name for name in packed if name.startswith(("tests/", "k8s/", "kernels/", "model/"))]


def test_it_holds_the_kernels_of_each_processor_and_is_for_any_python(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in packed if name.startswith(COMPILED)} == {
        COMPILED + file_name(variant) for variant in VARIANTS.values()
    }
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")


def test_without_a_compiler_it_is_for_any_processor(tmp_path: Path) -> None:
    made = built(tmp_path, PATH=str(Path(sys.executable).parent))
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    assert made.name.endswith("-py3-none-any.whl")


def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = tmp_path / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    # Our dependencies come from this environment, whose own divisi, an editable one, is not on a plain path.
    # No compiler, and nothing that was compiled before.
    env = {
        **os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"], "HOME": str(tmp_path), "PATH": str(python.parent)
    }  # fmt: skip
    divisi = str(tmp_path / "venv" / "bin" / "divisi")

    def call(*command: str) -> str:
        return subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    where = call(str(python), "-c", "import divisi.model.config as m; print(m.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "examples:" in call(divisi, "--help")
    inspected = call(divisi, "inspect")
    assert "divisi-demo" in inspected
    assert f"C++ {runnable_variants()[0].name}" in inspected
    call(divisi, "checkpoint", "random", "--out", "tiny")
    assert "expert:1" in call(divisi, "inspect", "tiny", "--expert-shards", "2")
