"""``python -m divisi.benchmarks.gpu [test | bench]``: check kernels and model on a GPU, then time the kernels."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from divisi.benchmarks.gpu import report
from divisi.benchmarks.gpu.cases import Case, Draw, exact
from divisi.benchmarks.gpu.check import WrongResult, bit_equal, expect_close, expect_replay_in_bits
from divisi.benchmarks.gpu.model import log_probabilities
from divisi.benchmarks.gpu.padding import ADDED, expect_padding_to_be_nobodys, padded_cases
from divisi.benchmarks.gpu.report import Row
from divisi.benchmarks.gpu.sanitize import sanitize
from divisi.benchmarks.gpu.shapes import CHECKED, CHECKED_LARGE, DELTA, ODD_DELTA, SMALL_DELTA, TIMED
from divisi.benchmarks.gpu.timing import Timer, copy_bandwidth, product_rate
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.random_checkpoint import write_random_checkpoint

_CPU = torch.device("cpu")
_MODEL_FP32 = 2e-3
"""Of log-probabilities, over 8 layers whose sums run in another order, with the scan's products in three tf32 parts."""
_MODEL_BF16 = 1.5
"""How many times as far as the references in bf16 the kernels may be from fp32, on average."""


def main() -> int:
    """Return the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m divisi.benchmarks.gpu", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["test", "bench"], default="bench", help="default: bench, tests too")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--small", action="store_true", help="only the small cases, as for compute-sanitizer")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out memcheck and racecheck")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; the kernels' tests without one are in tests/kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    began = time.perf_counter()
    failures = check_kernels(device, options.only, options.small)
    if not options.only and not options.small:
        failures += check_model(device)
    if not options.no_sanitizer:
        failures += sanitize()
    rows: list[Row] = []
    if options.what == "bench":
        ceilings = copy_bandwidth(device), product_rate(device)
        rows, wrong = time_kernels(device, options.only)
        failures += wrong
        text = report.write(rows, ceilings, failures, device, options.out)
        print(text)
    print(f"{len(failures)} failures in {time.perf_counter() - began:.0f} s", *failures, sep="\n", flush=True)
    return len(failures)


def check_kernels(device: torch.device, only: str, small: bool) -> list[str]:
    """Every case in both dtypes."""
    failures = []
    triton = select_kernels(device, "triton")
    for name, make in (*CHECKED.items(), *({} if small else CHECKED_LARGE).items()):
        for dtype in (torch.float32, torch.bfloat16):
            case = make(Draw(len(name), dtype, device), name)
            if only in case.operation and not (name in CHECKED_LARGE and dtype is torch.float32):
                failures += checked(case, dtype, triton, device)[1]
    if only in "gated_delta_decode":
        for shape in (SMALL_DELTA, ODD_DELTA, DELTA):
            try:
                expect_replay_in_bits(triton, Draw(0, torch.bfloat16, device), shape)
                print(f"ok replay: the same bits at {shape}", flush=True)
            except WrongResult as error:
                failures.append(str(error))
    for case in padded_cases(Draw(0, torch.bfloat16, device)):
        try:
            for rows, sequences in ADDED if only in case.operation else ():
                expect_padding_to_be_nobodys(triton, case, rows, sequences)
        except WrongResult as error:
            failures.append(str(error))
    return failures


def checked(case: Case, dtype: torch.dtype, kernels: Kernels, device: torch.device) -> tuple[float, list[str]]:
    """The deviation in tolerances from the reference in fp32, and what is wrong: two runs must give the same bits."""
    title = f"{case.operation} ({case.name}, {str(dtype).removeprefix('torch.')})"
    try:
        first, second = case.run(kernels), case.run(kernels)
        bit_equal(case.operation, first, second)
        del second
        expected = case.mapped(exact).run(select_kernels(device, "reference"))
        worst = expect_close(case.operation, dtype, first, expected)
    except WrongResult as error:
        print(f"WRONG {title}: {error}", flush=True)
        return float("nan"), [f"{title}: {error}"]
    except Exception as error:  # noqa: BLE001 - a kernel that cannot be launched is one failure among others
        print(f"FAILED {title}: {error!r}", flush=True)
        return float("nan"), [f"{title}: {error!r}"[:400]]
    print(f"ok {title}: {worst:.3f} of the tolerance", flush=True)
    return worst, []


def check_model(device: torch.device) -> list[str]:
    """A random checkpoint through ModelRunner."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_random_checkpoint(path, tokenizer=False)
        truth = log_probabilities(path, "reference", torch.float32, _CPU)
        for kernels in ("reference", "triton"):
            told = log_probabilities(path, kernels, torch.float32, device)
            error = (told - truth).abs().max().item()
            print(f"model, fp32, {kernels}: log-probabilities within {error:.1e} of the CPU's", flush=True)
            if not error <= _MODEL_FP32:
                failures.append(f"model in fp32 with {kernels}: {error:.1e}, more than {_MODEL_FP32:.0e}")
        errors = {}
        for kernels in ("reference", "triton"):
            told = log_probabilities(path, kernels, torch.bfloat16, device)
            errors[kernels] = (told - truth).abs().mean().item()
            print(f"model, bf16, {kernels}: {errors[kernels]:.4f} from fp32 on average", flush=True)
        if not errors["triton"] <= _MODEL_BF16 * errors["reference"]:
            failures.append(f"model in bf16: {errors['triton']:.4f} from fp32, references {errors['reference']:.4f}")
    return failures


def time_kernels(device: torch.device, only: str) -> tuple[list[Row], list[str]]:
    """Check and time the published shapes; a wrong result gets no time."""
    triton, plain, timer = select_kernels(device, "triton"), select_kernels(device, "reference"), Timer(device)
    rows, failures = [], []
    for name, make in TIMED:
        case = make(Draw(len(name), torch.bfloat16, device), name)
        if only not in case.operation:
            continue
        worst, wrong = checked(case, torch.bfloat16, triton, device)
        failures += wrong
        if not wrong:
            rows.append(Row(case, worst, timer.case(case, triton), timer.case(case, plain)))
            print(rows[-1].text(), flush=True)
        torch.cuda.empty_cache()
    return rows, failures


if __name__ == "__main__":
    sys.exit(main())
