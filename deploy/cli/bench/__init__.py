"""`divisi bench`: load any OpenAI-compatible server and measure what its users would see."""

from __future__ import annotations

import argparse

from divisi.deploy.cli.flags import add_connection_flags, positive

EXAMPLES = """\
examples:
  divisi bench --concurrency 8 --requests 100                 eight users who ask again as soon as they are answered
  divisi bench --rate 4 --duration 60                         four requests a second for a minute, at random instants
  divisi bench --rate 4 --duration 60 --input-tokens 1000 --output-tokens 200 --json run.json
  divisi bench --base-url https://host/v1 --api-key @key.txt --no-ignore-eos
  divisi bench --prompts prompts.jsonl -p temperature=0       a line is text, {"prompt": ...} or {"messages": ...}

how to read it:
  time to first token   from sending to the first text; queueing and prefill
  inter-token latency   mean time between the tokens of one answer
  longest gap           longest silence inside an answer: stalls that a mean hides
  With --concurrency a slow server is asked less often; use --rate to see how it queues. Tokens are counted by the
  server (`usage`), never by chunks. Refused requests (429) are counted apart and are in no latency.

Exit status: 0 when every request ended well or with 429, 1 when one failed or none ended well, 130 after Ctrl-C.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Load any OpenAI-compatible server; measure time to first token, token rates and throughput.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_flags(parser)
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", metavar="N", type=positive(int), help="requests in flight (default: 4)")
    pace.add_argument(
        "--rate", metavar="R", type=positive(float), help="requests a second, at random (Poisson) instants"
    )
    load.add_argument(
        "--requests", metavar="N", type=positive(int), help="default: 64, without limit if --duration is given"
    )
    load.add_argument(
        "--duration", metavar="SECONDS", type=positive(float), help="send for so long; what runs then is waited for"
    )
    load.add_argument("--warmup", metavar="N", type=int, default=2, help="requests before it counts (default: 2)")
    work = parser.add_argument_group("requests")
    work.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    work.add_argument(
        "--input-tokens", metavar="N", type=positive(int), default=256,
        help="of random text, about; two probes find how the server counts (default: 256)",
    )  # fmt: skip
    work.add_argument("--output-tokens", metavar="N", type=positive(int), default=64, help="max_tokens (default: 64)")
    work.add_argument("--prompts", metavar="FILE", help="prompts in place of random text, one a line, shuffled")
    work.add_argument(
        "--no-ignore-eos", action="store_true",
        help="let answers end early: for servers that refuse the field ignore_eos, and for real prompts",
    )  # fmt: skip
    work.add_argument(
        "-p", "--param", metavar="NAME=VALUE", action="append", default=[], help="a field of every request"
    )
    work.add_argument("--seed", metavar="N", type=int, default=0, help="of prompts and arrivals (default: 0)")
    report = parser.add_argument_group("report")
    report.add_argument("--json", metavar="FILE", help="write the numbers as JSON; - is standard output")
    report.add_argument("--records", action="store_true", help="with --json: every single request too")
    report.add_argument("--quiet", action="store_true", help="no live view")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the server and report. Raises SettingsError and RemoteError (before the run; later errors are counted)."""
    # late: `divisi --help` should not pay for its imports
    from divisi.deploy.cli.bench.command import bench

    return bench(args)
