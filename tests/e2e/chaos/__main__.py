"""Blows fall on a server of the demo model, and every answer is judged; see `make chaos`."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e.chaos.asks import asks
from tests.e2e.chaos.blows import KINDS, plan
from tests.e2e.chaos.harness import Chaos
from tests.e2e.chaos.report import gaps, plot, summary, table
from tests.e2e.chaos.run import served, verdict_of

_LEAST_FOUND = 0.7


def main() -> int:
    """Returns an exit status: whether anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--blows", type=int, default=50)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of what is struck")
    parser.add_argument("--openings", type=int, default=2, help="prompts of each kind of stream")
    parser.add_argument("--copies", type=int, default=0, help="of each shard's experts, on the other one")
    parser.add_argument("--out", type=Path, help="folder for chaos.md and chaos.svg, or chaos-copies")
    options = parser.parse_args()
    begin = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    blows = plan(options.seed, options.blows, options.kinds.split(","))
    asked, record, left = asks(options.openings), None, ""
    try:
        with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log.txt", options.copies) as cluster:
            print(f"ready after {cluster.ready_after_s:.1f} s", flush=True)
            record = asyncio.run(Chaos(cluster, blows, lambda line: print(line, flush=True)).run(asked))
    except AssertionError as error:  # it has not ended in good order, or left something
        if record is None:
            raise
        left = str(error)
    verdict, found = verdict_of(record, asked), gaps(record)
    verdict.faults += [f"at its end: {left}"] if left else []
    if (hits := sum(hit.streams > 0 for hit, _ in found)) < _LEAST_FOUND * options.blows:
        verdict.faults.append(f"only {hits} of {options.blows} blows found a stream of theirs open")
    lines = [*summary(record, verdict), "", *table(found), "", f"{time.monotonic() - begin:.0f} s in all"]
    print("\n".join(lines))
    if options.out is not None:
        name = "chaos-copies" if options.copies else "chaos"
        with_copies = ", with copies of the experts" if options.copies else ""
        head = [
            f"# {options.blows} random blows, seed {options.seed}{with_copies}",
            "",
            *(str(hit.blow) for hit in record.struck),
            "",
        ]
        (options.out / f"{name}.md").write_text("\n".join([*head, *lines, "", f"![gaps]({name}.svg)"]) + "\n")
        (options.out / f"{name}.svg").write_text(plot(found))
    return bool(verdict.faults)


if __name__ == "__main__":
    sys.exit(main())
