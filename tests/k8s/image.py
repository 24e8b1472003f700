"""The image, built by its own Dockerfile with buildah, and containers of it in small: no Docker, no registry of images.

The base image is Debian's packages under the name of Python's, whose Debian has the same Python 3.11; all that the
Dockerfile does is done. Needs root, `buildah` and `mmdebstrap`, and reaches Debian's packages and PyPI.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.k8s.helm import ROOT
from tests.support.lab import Machine

_CACHE = Path.home() / ".cache" / "divisi" / "image"
_DEBIAN, _PYTHON = "bookworm", "3.11"
_BASE = f"docker.io/library/python:{_PYTHON}-slim-{_DEBIAN}"
_MIRROR = "http://deb.debian.org/debian"
_NAME = "localhost/divisi:cpu"
_BEFORE = "DIVISI_IMAGE"
"""Names an image in buildah's store that was built before; a build takes minutes."""
USER = 65532
_ENTER = """set -e
root={root}
mount --bind $root $root
mount --rbind /proc $root/proc
mount --rbind /dev $root/dev
mount -t tmpfs tmpfs $root/tmp
mount -t tmpfs tmpfs $root/run
install -d -o {user} -g {user} $root/run/divisi $root/tmp/home
mount --bind /etc/hosts $root/etc/hosts
{more}
mount -o remount,bind,ro $root
exec chroot $root setpriv --reuid={user} --regid={user} --clear-groups --bounding-set=-all --no-new-privs \
  env -i {environment} {command}
"""


@dataclass(frozen=True)
class Image:
    """A built image, whose files are at `root`."""

    name: str
    root: Path
    environment: Mapping[str, str]

    def command(self, command: Sequence[str], more: str, environment: Mapping[str, str]) -> list[str]:
        """For Machine.start: as a user without rights, its root read-only; `more` are shell lines before.

        Its /tmp and /run/divisi begin empty, and it can write there only.
        """
        told = {**self.environment, **environment}
        script = _ENTER.format(
            root=shlex.quote(str(self.root)), user=USER, more=more, command=shlex.join(command),
            environment=" ".join(shlex.quote(f"{name}={value}") for name, value in told.items()),
        )  # fmt: skip
        return ["bash", "-c", script]

    def start(
        self, machine: Machine, command: Sequence[str], more: str = "", **environment: str
    ) -> subprocess.Popen[bytes]:
        """On a machine of the lab, from which there is no way to the network."""
        return machine.start(self.command(command, more, environment))


@contextlib.contextmanager
def built(folder: Path) -> Iterator[Image]:
    """The target `cpu`. Skips the test where a program is missing; fails with the build's last words."""
    for program in ("buildah", "mmdebstrap"):
        if shutil.which(program) is None or os.getuid() != 0:
            pytest.skip(f"building the image takes root and {program}: install Debian's {program}")
    before = os.environ.get(_BEFORE)
    name = before or _build(folder)
    container = _buildah("from", "--pull-never", name)
    try:
        listed = _buildah("run", "--isolation", "chroot", container, "--", "env")
        environment = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
        kept = {name: environment[name] for name in ("PATH", "HOME", "PYTHONDONTWRITEBYTECODE")}
        yield Image(f"{before}, built before" if before else "built here", Path(_buildah("mount", container)), kept)
    finally:
        _buildah("rm", container)


def _build(folder: Path) -> str:
    _base()
    pip = folder / "pip.conf"
    cert, links = os.environ.get("PIP_CERT", ""), os.environ.get("PIP_FIND_LINKS", "")
    pip.write_text("[global]\n" + (f"cert = {cert}\n" if cert else "") + (f"find-links = {links}\n" if links else ""))
    here = [f"{pip}:/etc/pip.conf:ro", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    if Path(links).is_absolute():
        here.append(f"{links}:{links}:ro")
    _buildah(
        "bud", "--isolation", "chroot", "--network", "host", "--pull-never", "--layers",
        "--build-arg", f"PYTHON={_PYTHON}", "--build-arg", "TORCH_INDEX=https://pypi.org/simple",
        *(word for volume in here for word in ("--volume", volume)),
        "--file", str(ROOT / "k8s/image/Dockerfile"), "--target", "cpu", "--tag", _NAME, str(ROOT),
    )  # fmt: skip
    return _NAME


def _base() -> None:
    """Debian's packages as the base image, made once and kept."""
    if _BASE in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines():
        return
    archive = _CACHE / "base.tar"
    packages = "python3,python3-venv,ca-certificates"
    _run(["mmdebstrap", "--variant=apt", f"--include={packages}", "--dpkgopt=force-unsafe-io", _DEBIAN, str(archive),
          _MIRROR])  # fmt: skip
    container = _buildah("from", "scratch")
    _buildah("add", container, str(archive), "/")
    _buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", container)
    _buildah("commit", "--quiet", "--rm", container, _BASE)
    archive.unlink()


def _buildah(*arguments: str) -> str:
    store = ["--root", str(_CACHE / "store"), "--runroot", str(_CACHE / "run"), "--storage-driver", "overlay"]
    return _run(["buildah", *store, *arguments])


def _run(command: list[str]) -> str:
    _CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()
