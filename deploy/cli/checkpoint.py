"""`divisi checkpoint random`: writes a seeded random checkpoint with a tokenizer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  divisi checkpoint random --out /tmp/tiny                       about 5 MB, every kind of layer
  divisi checkpoint random --out /tmp/like --like config.json    the shape of another model
  divisi checkpoint random --out /tmp/tiny --seed 7 --layout packed
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("checkpoint", help="make checkpoints", description="Make checkpoints.")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    random = kinds.add_parser(
        "random",
        help="random weights and a working tokenizer",
        description="Write a random checkpoint with a tokenizer: it answers noise, but it exercises everything.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    random.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new or empty directory")
    random.add_argument("--like", metavar="CONFIG", type=Path, help="a config.json, or a directory that has one")
    random.add_argument("--seed", type=int, default=0, help="default: 0")
    random.add_argument(
        "--layout", choices=("published", "packed"), default="published",
        help="a tensor per expert, or all experts of a layer in one (default: published)",
    )  # fmt: skip
    random.add_argument("--mtp", action="store_true", help="with a multi-token prediction layer")
    random.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write it and say what was written. Raises SettingsError and ConfigError."""
    from divisi.deploy.settings import SettingsError  # late: `--help` should not pay for it

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise SettingsError(f"--out: {args.out} exists and is not empty; give a new directory")
    config_json = None if args.like is None else _read_config(args.like)
    # late: imports torch
    from divisi.model.random_checkpoint import write_random_checkpoint

    try:
        config = write_random_checkpoint(args.out, config_json, args.seed, args.layout, mtp=args.mtp)
    except OSError as error:
        raise SettingsError(f"--out: cannot write {error.filename or args.out}: {error.strerror}") from None
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    layers, experts = config.num_hidden_layers, config.num_experts
    print(f"{args.out}: {layers} layers, {experts} experts, {size / 1e6:.1f} MB of weights")
    print(f"serve it: divisi serve {args.out}")
    return 0


def _read_config(path: Path) -> dict[str, Any]:
    from divisi.deploy.settings import SettingsError

    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"--like: {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"--like: {path}: is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"--like: {path}: must hold a JSON object")
    return data
