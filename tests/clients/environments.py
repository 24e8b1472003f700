"""One virtual environment per client, kept between runs: a client's own versions, never the project's."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALL_TIMEOUT_S = 1200
_STAMP = ".requirements.txt"


class NotInstallableError(Exception):
    """pip could not install a client; the message ends with pip's own words."""


def cache_folder() -> Path:
    """Where environments lie: one folder for each client and version."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "divisi" / "clients"


def environment(name: str) -> Path:
    """The `bin` folder of client `name`, installed on first use and whenever its requirements change.

    Raises NotInstallableError.
    """
    wanted = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    match = re.search(rf"^{name.replace('-', '[-_]')}==(\S+)", wanted, re.MULTILINE)
    assert match, f"requirements/{name}.txt does not pin {name}"
    folder = cache_folder() / f"{name}-{match[1]}"
    _install_once(folder, wanted, lambda: _install(folder, REQUIREMENTS / f"{name}.txt"))
    return folder / "bin"


def node_environment(name: str) -> Path:
    """The folder with `node_modules` of client `name`, installed from its `package-lock.json` as above.

    Raises NotInstallableError, also where there is no Node.js.
    """
    source = REQUIREMENTS / name
    folder = cache_folder() / name
    wanted = (source / "package-lock.json").read_text(encoding="utf-8")
    _install_once(folder, wanted, lambda: _install_packages(folder, source))
    return folder


def _install_once(folder: Path, wanted: str, install: Callable[[], None]) -> None:
    """Two runs at once must not install into one folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / _STAMP
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            install()
            stamp.write_text(wanted, encoding="utf-8")


def _install_packages(folder: Path, source: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise NotInstallableError(f"{source.name}: there is no npm; install Node.js")
    folder.mkdir()
    for file in ("package.json", "package-lock.json"):
        shutil.copy(source / file, folder / file)
    done = subprocess.run(
        [npm, "ci", "--no-audit", "--no-fund"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise NotInstallableError(f"{source.name}: {done.stderr.strip()[-600:]}")


def _install(folder: Path, requirements: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    try:
        done = subprocess.run(
            [*pip, "-r", str(requirements)], capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise NotInstallableError(f"{requirements.name}: not installed within {INSTALL_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise NotInstallableError(f"{requirements.name}: {done.stderr.strip()[-600:]}")
