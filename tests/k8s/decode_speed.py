"""What the fastest kernels of an installation cost, beside the same sources compiled for this processor alone.

    python decode_speed.py build DIR           compile the latter (g++), for a HOME whose .cache/divisi is DIR
    python decode_speed.py time KIND MODEL     a line of seconds for each line of standard input: `ahead` or `native`

Stands alone: the installation that is timed has no tests.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.kernels.native import build, variants

STEPS, PROMPT = 48, 16
OWN_FLAGS = ("-march=native",)


def native() -> variants.Variant:
    """The variant that is chosen here, under other flags; from now on it is chosen."""
    fastest = variants.runnable_variants()[0]
    own = replace(fastest, flags=(*OWN_FLAGS, *(flag for flag in fastest.flags if flag.startswith("-D"))))
    variants.VARIANTS[fastest.name] = own  # type: ignore[index]
    return own


def main(command: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if command == "build":
        print(build.build(native(), Path(arguments[0])))
        return
    kind, model_dir = arguments
    variant = native() if kind == "native" else variants.runnable_variants()[0]
    library = build.find(variant)
    spec = GangSpec(
        name="speed", model_dir=model_dir, dtype="bfloat16", device="cpu", threads=1, kernels="auto",
        deterministic=False, shape=GangShape(1, 0), max_model_len=512, kv_memory=2**26, page_size=16, max_seqs=4,
        max_step_tokens=256, step_deadline_s=60.0, max_draft_tokens=0,
    )  # fmt: skip
    config = served_config(spec)
    engine, experts = build_engine(spec, config)
    assert experts is not None
    dispatcher = LocalEnd(experts)
    print(library, flush=True)
    for number, _ in enumerate(sys.stdin):
        prompt = tuple(100 + (number * 31 + index) % 200 for index in range(PROMPT))
        engine.submit(Request(str(number), prompt, STEPS + 1, Sampling(temperature=0.0)))
        plan, begun = engine.plan(), 0.0
        while plan is not None:
            engine.run(plan, dispatcher)
            begun = begun or time.perf_counter()  # the prompt's step is not timed
            plan = engine.plan()
        print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
