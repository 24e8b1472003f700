"""The table: time beside plain torch, and the share of what the card can do."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from divisi.benchmarks.gpu.cases import Case


@dataclass(frozen=True)
class Row:
    """One case's measurement."""

    case: Case
    deviation: float
    milliseconds: float
    plain_milliseconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes that must move per second."""
        return 1e3 * self.case.bytes / self.milliseconds

    @property
    def rate(self) -> float:
        """Operations per second."""
        return 1e3 * self.case.flops / self.milliseconds

    def text(self) -> str:
        """For the log."""
        return (
            f"{self.case.operation:20s} {self.case.name:24s} {1e3 * self.milliseconds:10.1f} us, "
            f"plain {1e3 * self.plain_milliseconds:10.1f} us, "
            f"{self.bandwidth / 1e9:6.0f} GB/s, {self.rate / 1e12:6.1f} TFLOP/s"
        )


def write(
    rows: Sequence[Row], ceilings: tuple[float, float], failures: Sequence[str], device: torch.device, out: Path | None
) -> str:
    """Return the table in Markdown, and store it with its numbers in ``out`` where that is given."""
    card = torch.cuda.get_device_name(device)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}"
    lines = [
        f"# Kernels on {card}",
        "",
        f"Commit {_commit()}, {datetime.now(UTC).date()}; {versions}, Python {platform.python_version()}; bf16. Times "
        "are of the device with cold caches, medians; bytes are what the operation must read and write. "
        f"A large copy moves {ceilings[0] / 1e12:.2f} TB/s here, a large bf16 product runs at "
        f"{ceilings[1] / 1e12:.0f} TFLOP/s; percentages are of these. Every row was first compared with its reference "
        "in fp32 and ran twice with equal bits; the deviation is in units of the tolerance.",
        "",
        "| operation | case | us | plain torch us | x | GB/s | of copy | TFLOP/s | of product | deviation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case.operation} | {row.case.name} | {1e3 * row.milliseconds:.1f} | "
            f"{1e3 * row.plain_milliseconds:,.0f} | {row.plain_milliseconds / row.milliseconds:.1f} | "
            f"{row.bandwidth / 1e9:,.0f} | {row.bandwidth / ceilings[0]:.0%} | {row.rate / 1e12:.1f} | "
            f"{row.rate / ceilings[1]:.0%} | {row.deviation:.2f} |"
        )
    lines += ["", *(f"FAILED: {failure}" for failure in failures)]
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.md").write_text(text, encoding="utf-8")
        data = {
            "commit": _commit(), "card": card, "versions": versions, "failures": list(failures),
            "copy_bytes_per_s": ceilings[0], "product_flops_per_s": ceilings[1],
            "rows": [
                {
                    "operation": r.case.operation, "case": r.case.name, "ms": r.milliseconds, "bytes": r.case.bytes,
                    "plain_ms": r.plain_milliseconds, "flops": r.case.flops, "deviation": r.deviation,
                }
                for r in rows
            ],
        }  # fmt: skip
        (out / "gpu.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
