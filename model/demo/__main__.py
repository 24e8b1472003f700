"""`python -m divisi.model.demo`: make the tokenizer, train a stage, evaluate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from divisi.model.demo import checkpoint_dir

_EXAMPLES = """\
from nothing to a checkpoint (five hours on two cores):
  python -m divisi.model.demo tokenizer --out demo
  python -m divisi.model.demo train begin --out demo --seed 3
  python -m divisi.model.demo train main --out demo --seed 4
  python -m divisi.model.demo train sharp --out demo --seed 7
  python -m divisi.model.demo train long --out demo --seed 5
  cp -r demo demo-long
  python -m divisi.model.demo train facts --out demo --seed 8
  cp -r demo demo-facts
  python -m divisi.model.demo train last --out demo --seed 9
  python -m divisi.model.demo average demo-long demo-facts demo --out demo
  cp -r demo demo-three
  python -m divisi.model.demo train calls --out demo --seed 21
  python -m divisi.model.demo average demo-three demo --out demo
  cp -r demo demo-calls
  python -m divisi.model.demo train even --out demo --seed 22
  python -m divisi.model.demo average demo-calls demo --out demo
  python -m divisi.model.demo widen --out demo --seed 1
  cp -r demo demo-widened
  python -m divisi.model.demo train wide --out demo --seed 23
  python -m divisi.model.demo average demo-widened demo --out demo
  cp -r demo demo-wide
  python -m divisi.model.demo train names --out demo --seed 24
  python -m divisi.model.demo average demo-wide demo --out demo
  python -m divisi.model.demo train drafts --out demo --seed 6
  python -m divisi.model.demo train ahead --out demo --seed 77 --workers 1
then, with `divisi serve demo` in another terminal:
  python -m divisi.model.demo evaluate --url http://127.0.0.1:8000 --checkpoint demo
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m divisi.model.demo",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenizer(commands)
    _add_train(commands)
    _add_average(commands)
    _add_widen(commands)
    _add_probe(commands)
    _add_evaluate(commands)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        return 130
    return status


def _add_tokenizer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("tokenizer", help="learn the tokenizer from the corpus and write it with the template")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to begin")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_tokenizer)


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="train one stage")
    parser.add_argument("stage", help="one of those in stages.py")
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint folder: goes on from the weights in it, if any"
    )
    parser.add_argument(
        "--steps", type=int, help="so many steps in place of the stage's own; what it does when scales along"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed and workers give the same weights")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.set_defaults(run=_train)


def _add_average(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("average", help="average the weights of several stages")
    parser.add_argument("folders", type=Path, nargs="+", help="checkpoint folders; the MTP layer is the last one's")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder, with a tokenizer, to write to")
    parser.set_defaults(run=_average)


def _add_widen(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("widen", help="double the attention heads, which changes no answer yet")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder: read and written")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_widen)


def _add_probe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("probe", help="a quick look at what the weights get right, without a server")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_dir())
    parser.add_argument("--skills", nargs="*", help="only these (default: all)")
    parser.add_argument("--cases", type=int, default=50, help="of each skill (default: 50)")
    parser.add_argument("--split", choices=("train", "dev"), default="dev", help="of words (default: dev)")
    parser.set_defaults(run=_probe)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="ask a running server held-out questions; write what it got right")
    parser.add_argument("--url", required=True, help="of the server, as in http://127.0.0.1:8000")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_dir(), help="its weights, for MTP and routing")
    parser.add_argument("--model", help="the served name (default: what the server lists first)")
    parser.add_argument("--skills", nargs="*", help="only these (default: all)")
    parser.add_argument("--cases", type=int, default=200, help="of each skill (default: 200)")
    parser.add_argument("--at-once", type=int, default=12, help="requests in flight (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation.json"), help="results; the page goes beside it, as .md"
    )
    parser.set_defaults(run=_evaluate)


def _tokenizer(args: argparse.Namespace) -> int:
    from divisi.model.demo.stages import make_tokenizer

    make_tokenizer(args.out, args.seed)
    return 0


def _train(args: argparse.Namespace) -> int:
    from divisi.model.demo.stages import STAGES, run_stage

    if args.stage not in STAGES:
        print(f"stage: {args.stage!r} is none; take one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    run_stage(args.stage, args.out, args.seed, args.workers, args.steps)
    return 0


def _average(args: argparse.Namespace) -> int:
    from divisi.model.demo.export import average_weights

    average_weights(args.folders, args.out)
    return 0


def _widen(args: argparse.Namespace) -> int:
    from divisi.model.demo.export import read_network, write_checkpoint
    from divisi.model.demo.widen import widen

    write_checkpoint(widen(read_network(args.out), args.seed).state_dict(), args.out)
    return 0


def _probe(args: argparse.Namespace) -> int:
    from divisi.model.demo.batches import Writer
    from divisi.model.demo.evaluation.run import chosen_skills
    from divisi.model.demo.export import read_network
    from divisi.model.demo.probe import probe

    if (skills := chosen_skills(args.skills)) is None:
        return 2
    network, writer = read_network(args.checkpoint), Writer(args.checkpoint)
    for skill in skills:
        right = probe(network, writer, skill, args.cases, args.split)
        print(f"{skill:16} {right:4} of {args.cases}", flush=True)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from divisi.model.demo.evaluation.run import evaluate

    return evaluate(args)


if __name__ == "__main__":
    sys.exit(main())
