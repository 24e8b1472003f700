"""Keeps measured step times from one start to the next, in the user's cache: one file for each set of circumstances."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from divisi.cluster.spec import GangSpec
from divisi.cluster.step_times.measured import Measured, Reading

log = logging.getLogger(__name__)

_CODE = ("kernels", "model", "cluster")
"""Folders whose sources say which version it is that was measured."""
_ROOT = Path(__file__).parents[3]
"""Where these are."""


class _Content(BaseModel):
    key: dict[str, str]
    full: dict[int, dict[int, float]]
    draft: dict[int, float]
    reading: tuple[float, float, float]
    first: dict[int, float]


class TimesFile:
    """One table. Nothing depends on it: what cannot be read is measured again, what cannot be written is not kept."""

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        """`key` is all that the times depend on."""
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._path = folder / f"step-times-{digest[:16]}.json"

    def read(self) -> Measured | None:
        """The table; None where there is none that can be used."""
        try:
            content = _Content.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return None
        if content.key != self._key or not content.full or not content.draft:
            return None
        return Measured(content.full, content.draft, Reading(*content.reading), content.first)

    def write(self, measured: Measured) -> None:
        """Keep a table; says so in the log where that fails."""
        full = {sequences: dict(by_rows) for sequences, by_rows in measured.full.items()}
        content = _Content(
            key=self._key,
            full=full,
            draft=dict(measured.draft),
            reading=measured.reading,
            first=dict(measured.first),
        )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix="step-times-", delete=False) as scratch:
                scratch.write(content.model_dump_json().encode())
            Path(scratch.name).replace(self._path)
        except OSError as error:
            log.warning("step times are measured again at the next start: %s cannot be written (%s)", self._path, error)


def cache_folder() -> Path:
    """The user's; one of temporary files for a user without a home."""
    try:
        return Path.home() / ".cache" / "divisi"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "divisi"


def circumstances(spec: GangSpec, max_rows: int) -> dict[str, str]:
    """What step times depend on: machine, model, dtype, topology, threads, version. To be asked inside an epoch."""
    shape = spec.shape
    return {
        "machine": _machine(spec.device),
        "model": hashlib.sha256((Path(spec.model_dir) / "config.json").read_bytes()).hexdigest(),
        "dtype": spec.dtype,
        "topology": f"{shape.attention_workers}+{shape.expert_shards}{' colocated' if shape.colocated else ''}",
        "micro_batches": spec.micro_batches,
        "threads": str(torch.get_num_threads()),
        "kernels": f"{spec.kernels}{' deterministic' if spec.deterministic else ''}",
        "sequences": f"{spec.max_seqs} of up to {max_rows} rows",
        "version": f"{torch.__version__} {code_version()}",
    }


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    known = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    model = " ".join(fields.get(name, "?") for name in ("model name", "cpu family", "model"))
    cores = sum(line.startswith("processor") for line in lines)
    return f"{model}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


@cache
def code_version(root: Path = _ROOT) -> str:
    """A digest of all sources that what a step takes depends on."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
