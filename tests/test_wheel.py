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

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "model", "cluster", "deploy", "benchmarks")
DATA = {".py", ".yaml", ".cfg", ".conf", ".service", ".txt", ".jinja", ".cpp", ".h", ".typed", ".json", ".safetensors"}

pytestmark = [pytest.mark.verify, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither an old build folder nor an editable install has a part in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


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


def test_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = tmp_path / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    # Our dependencies come from this environment, whose own divisi, an editable one, is not on a plain path.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    divisi = str(tmp_path / "venv" / "bin" / "divisi")

    def call(*command: str) -> str:
        return subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    where = call(str(python), "-c", "import divisi.model.config as m; print(m.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "examples:" in call(divisi, "--help")
    assert "divisi-demo" in call(divisi, "inspect")
    call(divisi, "checkpoint", "random", "--out", "tiny")
    assert "expert:1" in call(divisi, "inspect", "tiny", "--expert-shards", "2")
