"""Flags that commands share: of a deployment, and how they become settings; of the way to a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divisi.deploy.settings import Settings

# flag's destination -> (group, field) of Settings
_FIELDS = {
    "model_dir": ("model", "model_dir"),
    "dtype": ("model", "dtype"),
    "max_model_len": ("model", "max_model_len"),
    "topology": ("gang", "topology"),
    "attention_workers": ("gang", "attention_workers"),
    "expert_shards": ("gang", "expert_shards"),
    "dispatch": ("gang", "dispatch"),
    "micro_batches": ("gang", "micro_batches"),
    "device": ("gang", "device"),
    "threads_per_process": ("gang", "threads_per_process"),
    "pin_cores": ("gang", "pin_cores"),
    "kernels": ("gang", "kernels"),
    "deterministic": ("gang", "deterministic"),
    "kv_memory": ("cache", "kv_memory"),
    "gpu_memory_fraction": ("cache", "gpu_memory_fraction"),
    "page_size": ("cache", "page_size"),
    "max_seqs": ("cache", "max_seqs"),
    "max_step_tokens": ("cache", "max_step_tokens"),
    "mtp_max_draft_tokens": ("mtp", "max_draft_tokens"),
    "mtp_adaptive": ("mtp", "adaptive"),
    "host": ("http", "host"),
    "port": ("http", "port"),
    "served_model_name": ("http", "served_model_name"),
    "allowed_origins": ("http", "allowed_origins"),
    "ingress_replicas": ("http", "ingress_replicas"),
    "haproxy": ("http", "haproxy"),
    "max_queued_requests": ("limits", "max_queued_requests"),
    "api_keys_file": ("auth", "api_keys_file"),
    "log_file": ("log", "file"),
    "otlp_traces_endpoint": ("telemetry", "traces_endpoint"),
    "otlp_metrics_endpoint": ("telemetry", "metrics_endpoint"),
}


def add_deployment_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model directory, --config and the flags for model, gang and cache."""
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", nargs="?", type=Path,
        help="directory with config.json, safetensors and tokenizer.json (may be in the configuration file instead; "
        "where there is neither: divisi-demo, a small trained model)",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", type=Path,
        help="settings as TOML, YAML or JSON; flags win over it (default: the file named by DIVISI_CONFIG, if any)",
    )  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--dtype", choices=("auto", "bfloat16", "float32", "float16"), help="default: the checkpoint's")
    model.add_argument(
        "--max-model-len", metavar="TOKENS",
        help="longest prompt plus answer (default: the model's, or what --kv-memory holds)",
    )  # fmt: skip
    _add_gang_flags(parser.add_argument_group("gang"))
    _add_memory_flags(parser.add_argument_group("memory, for each attention worker"))
    mtp = parser.add_argument_group("multi-token prediction")
    mtp.add_argument(
        "--mtp-max-draft-tokens", metavar="N",
        help="most tokens drafted for an answer in a step, 0 to 8; 0 is off (default: 3 where the model can draft)",
    )  # fmt: skip
    mtp.add_argument(
        "--mtp-adaptive",
        action=argparse.BooleanOptionalAction,
        help="draft fewer where that makes more tokens per second, by measured times (default: on)",
    )


def _add_gang_flags(gang: argparse._ArgumentGroup) -> None:
    gang.add_argument(
        "--topology", choices=("local", "split", "colocated"),
        help="local: one process; split: workers and shards apart; colocated: each worker holds a share of the experts "
        "(default: split if shards are given)",
    )  # fmt: skip
    gang.add_argument("--attention-workers", metavar="N", help="each holds its own sequences (default: 1)")
    gang.add_argument("--expert-shards", metavar="N", help="the routed experts are shared out among them (default: 1)")
    gang.add_argument(
        "--dispatch", choices=("auto", "broadcast", "all_to_all"),
        help="how rows reach expert shards: all to each, or each to those that it visits (default: auto, by cost)",
    )  # fmt: skip
    gang.add_argument(
        "--micro-batches", choices=("auto", "never", "always"),
        help="which decoding steps are cut in two, so that attention and experts compute at once (default: auto)",
    )  # fmt: skip
    gang.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")
    gang.add_argument(
        "--threads-per-process",
        metavar="N",
        help="CPU threads of each rank (default: its machine's cores over the ranks there)",
    )
    gang.add_argument(
        "--pin-cores",
        action=argparse.BooleanOptionalAction,
        help="each rank keeps to cores of its own, HTTP to the others; where Ray is started here (default: off)",
    )
    gang.add_argument(
        "--kernels", metavar="[OP=]KIND,...",
        help="auto, reference, native (CPU; the fastest that runs of its builds amx, avx512-bf16, avx512, avx2, or one "
        "of these) or triton (GPU), and exceptions by operation, as in auto,route=reference",
    )  # fmt: skip
    gang.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="the same bits whatever else is served beside a request, at a slower prefill; on CPUs (default: off)",
    )


def _add_memory_flags(cache: argparse._ArgumentGroup) -> None:
    cache.add_argument(
        "--kv-memory", metavar="SIZE",
        help="for KV pages, as in 512MiB or 16GiB (default: what a GPU here has left; without one 1GiB)",
    )  # fmt: skip
    cache.add_argument(
        "--gpu-memory-fraction", metavar="X", help="of a GPU's memory for weights, states and KV pages (default: 0.9)"
    )
    cache.add_argument("--page-size", metavar="TOKENS", help="tokens per KV page (default: 16)")
    cache.add_argument("--max-seqs", metavar="N", help="sequences that run at once (default: 32)")
    cache.add_argument("--max-step-tokens", metavar="N", help="token budget of one step (default: 512)")


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which server to call, for `divisi.deploy.cli.remote.connection`."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", metavar="URL", default="http://127.0.0.1:8000/v1",
        help="where the OpenAI API is, with its /v1 (default: %(default)s)",
    )  # fmt: skip
    server.add_argument(
        "--api-key", metavar="KEY", help="sent as a bearer token; @FILE reads it from a file, out of sight of `ps`"
    )
    server.add_argument("--model", metavar="NAME", help="default: the first that the server names")
    server.add_argument(
        "--timeout", metavar="SECONDS", type=positive(float), default=300.0,
        help="longest wait for the next bytes of an answer (default: 300)",
    )  # fmt: skip


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """The `type` of a flag that takes a finite number above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {'whole number' if kind is int else 'number'}"  # argparse's messages name it
    return parse


def load_settings(args: argparse.Namespace) -> Settings:
    """Merge flags over the configuration file. Raises SettingsError."""
    from divisi.deploy.settings import Settings, SettingsError  # late: `--help` should not pay for it

    overrides: dict[str, dict[str, object]] = {}
    for flag, (group, field) in _FIELDS.items():
        overrides.setdefault(group, {})[field] = getattr(args, flag, None)
    settings = Settings.load(args.config, overrides)
    if not settings.model.model_dir.is_dir():
        raise SettingsError(
            f"model.model_dir: {settings.model.model_dir} is no directory; "
            f"give a model directory, or make one with: divisi checkpoint random --out {settings.model.model_dir}"
        )
    return settings
