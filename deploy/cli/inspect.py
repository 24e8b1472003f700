"""`divisi inspect`: what each rank of a deployment would load, without loading it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from divisi.deploy.cli.check import check_deployment
from divisi.deploy.cli.flags import add_deployment_flags, load_settings
from divisi.kernels.choice import kernels_here

if TYPE_CHECKING:
    from divisi.deploy.fit import Fit
    from divisi.deploy.settings import Settings
    from divisi.model.checkpoint import Checkpoint
    from divisi.model.config import ModelConfig
    from divisi.model.placement import Role

EXAMPLES = """\
examples:
  divisi inspect                                     the demo model
  divisi inspect /models/tiny                        one process
  divisi inspect /models/next --attention-workers 2 --expert-shards 4 --kv-memory 16GiB
  divisi inspect /models/next --expert-shards 8 --json
  divisi inspect /models/next --expert-shards 4 --gpu-memory 80GiB    what GPUs of that size would hold

Reads the headers of the files only. Memory that kernels and Python take on top is not counted.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="show what each rank would load",
        description="Check a checkpoint and show what each rank would load: tensors, bytes and how memory divides.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_deployment_flags(parser)
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", type=_size_of,
        help="plan for GPUs of that size, as in 80GiB, where there is none here (default: those that are here)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises what `check_deployment` raises, which is all that `divisi serve` refuses in files."""
    settings = load_settings(args)
    import torch  # late: `--help` should not pay for it

    from divisi.deploy.cli.card import own_gpu_memory

    if args.gpu_memory is None:
        checked = check_deployment(settings, torch.cuda.device_count(), own_gpu_memory(settings))
    else:
        checked = check_deployment(settings, math.inf, args.gpu_memory)
    report = build_report(checked.settings, checked.fitted, checked.config, checked.checkpoint)
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))
    return 0


def build_report(settings: Settings, fitted: Fit, config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the report as JSON-ready data; all sizes in bytes."""
    from divisi.model.placement import Role

    shape = settings.gang.shape
    virtual = settings.gang.virtual_shards
    roles = Role.all_of(config, shape.attention_workers, shape.expert_shards, shape.colocated, virtual)
    mtp = [info.num_bytes for name, info in checkpoint.tensors.items() if name.startswith("mtp.")]
    return {
        "model": {
            "name": settings.served_model_name,
            "layers": config.num_hidden_layers,
            "linear_attention_layers": len(config.linear_layers),
            "full_attention_layers": len(config.full_layers),
            "moe_layers": len(config.moe_layers),
            "experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            "device": fitted.device,
            "dtype": fitted.dtype,
            "kernels": kernels_here(settings.gang.kernels, fitted.device),
            "max_model_len": fitted.max_model_len,
        },
        "ranks": [_rank(role, settings, fitted, config, checkpoint) for role in roles],
        "notes": list(fitted.notes),
        "mtp": {"tensors": len(mtp), "bytes": sum(mtp), "max_draft_tokens": fitted.max_draft_tokens},
    }


def _rank(role: Role, settings: Settings, fitted: Fit, config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    from divisi.deploy.cli.card import weight_bytes
    from divisi.model.checkpoint import rank_tensors

    share, weights = rank_tensors(config, checkpoint.tensors, role), weight_bytes(role, fitted, config, checkpoint)
    rank: dict[str, Any] = {
        "seat": role.name,
        "experts": list(role.experts) or None,
        "tensors": len(share),
        "bytes_on_disk": sum(share.values()),
        "weight_bytes": weights,
        "memory_bytes": weights,
    }
    if role.attention:
        rank |= _sequence_memory(settings, fitted, config)
        rank["memory_bytes"] += rank["kv_bytes"] + rank["state_bytes"]
    rank |= _work_memory(role, rank.get("tokens", 0), settings, fitted, config)
    rank["memory_bytes"] += rank["rotation_bytes"] + rank["scratch_bytes"]
    return rank


def _work_memory(role: Role, tokens: int, settings: Settings, fitted: Fit, config: ModelConfig) -> dict[str, int]:
    """Rotations of the positions that the KV can hold; a step's values, for which a GPU has its fraction's rest."""
    from divisi.kernels.choice import packs_here
    from divisi.model.footprint.scratch import rotation_bytes, scratch_bytes

    rotations, cache = rotation_bytes(config, min(config.max_position_embeddings, tokens)), settings.cache
    if fitted.device != "cpu":
        return {"rotation_bytes": rotations, "scratch_bytes": 0}
    rows, logit_rows = cache.max_step_tokens, cache.max_seqs * (1 + fitted.max_draft_tokens)
    packed = fitted.dtype == "bfloat16" and packs_here(settings.gang.kernels)
    scratch = scratch_bytes(config, role, rows, min(rows, logit_rows), packed=packed)
    return {"rotation_bytes": rotations, "scratch_bytes": scratch}


def _sequence_memory(settings: Settings, fitted: Fit, config: ModelConfig) -> dict[str, int]:
    from divisi.deploy.cli.card import memory_budget

    budget = memory_budget(settings, fitted, config)
    return {
        "pages": budget.num_pages,
        "page_size": budget.page_size,
        "tokens": budget.num_tokens,
        "kv_bytes": budget.kv_bytes,
        "state_slots": budget.num_slots,
        "state_bytes": budget.state_bytes,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    model, mtp = report["model"], report["mtp"]
    lines = [
        f"{model['name']}: {model['layers']} layers ({model['linear_attention_layers']} linear attention, "
        f"{model['full_attention_layers']} full attention, {model['moe_layers']} with {model['experts']} experts, "
        f"top {model['experts_per_token']}), {model['dtype']}, up to {model['max_model_len']:,} tokens",
        f"Kernels on a machine like this one: {model['kernels']}",
        "",
        *_table(report["ranks"]),
        "",
    ]
    worker = report["ranks"][0]
    lines.append(
        f"Each attention worker: {worker['pages']:,} pages of {worker['page_size']} tokens = "
        f"{worker['tokens']:,} tokens of KV; {worker['state_slots']} state slots"
    )
    lines += report["notes"]
    if mtp["tensors"]:
        use = f"drafts up to {mtp['max_draft_tokens']} tokens" if mtp["max_draft_tokens"] else "off and not loaded"
        lines.append(f"MTP layer: {mtp['tensors']} tensors, {_size(mtp['bytes'])}, {use}")
    return lines


def _table(ranks: Sequence[dict[str, Any]]) -> list[str]:
    from divisi.model.placement import runs_of

    rows = [("seat", "experts", "tensors", "reads", "weights", "KV", "state", "rotations", "scratch", "memory")]
    for rank in ranks:
        experts = runs_of(rank["experts"]) if rank["experts"] else "-"
        kinds = ("weight", "kv", "state", "rotation", "scratch", "memory")
        sizes = [rank.get(name) for name in ("bytes_on_disk", *map("{}_bytes".format, kinds))]
        cells = [_size(size) if size else "-" for size in sizes]
        rows.append((rank["seat"], experts, f"{rank['tensors']:,}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]))
    return lines


def _size_of(text: str) -> int:
    from divisi.deploy.settings.values import parse_bytes

    try:
        return int(str(parse_bytes(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
