"""The comparison of two checkouts: a checkout is the same as itself, and what is planted is found and told."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from divisi.benchmarks.checkouts import cells, pairs, same
from divisi.benchmarks.checkouts.checkout import Checkout, Inside, inside
from divisi.benchmarks.checkouts.compare import Comparison, MarginRule
from divisi.benchmarks.checkouts.ratio import Ratios, median_interval
from divisi.benchmarks.checkouts.workload import Spec, Workload, unused_fields
from divisi.cluster.request import Request, Sampling
from divisi.model.config import ModelConfig
from divisi.model.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).parents[2]
FIELDS = [field.name for kind in (Request, Sampling) for field in fields(kind)]


def test_the_workload_is_seeded_and_uses_every_field() -> None:
    requests = Workload(1280, FIELDS, 0).requests(200)
    assert requests == Workload(1280, FIELDS, 0).requests(200)
    assert unused_fields(FIELDS, requests) == []
    assert max(sum(other["group"] == spec["group"] for other in requests) for spec in requests) > 1, "n > 1"
    assert {0, 1, 3, 10, None} == {spec["cancel_after"] for spec in requests}


def test_a_field_that_only_one_checkout_has_is_left_out() -> None:
    requests = Workload(1280, set(FIELDS) - {"min_p", "grammar"}, 0).requests(100)
    assert unused_fields(FIELDS, requests) == ["grammar", "min_p"]


def test_in_a_plain_workload_only_logits_decide() -> None:
    for spec in Workload(1280, FIELDS, 0).requests(200, plain=True):
        assert spec["request"]["sampling"] == {"temperature": 0.0}
        assert "grammar" not in spec["request"]
        assert "min_tokens" not in spec["request"]


def answer(**changes: Any) -> dict[str, Any]:
    told = [[5, -0.5, [[5, -0.5], [6, -1.0]]], [7, -0.25, []]]
    parts = {"tokens": [5, 7], "logprobs": told, "prompt logprobs": [None], "finish reason": "stop"}
    return parts | {"stop id": 3, "error": None} | changes


NEARLY = [[5, -0.5001, [[6, -0.5], [5, -1.0]]], [7, -0.25, []]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"tokens": [5, 8]}, "r: tokens 1 is 7 before and 8 after"),
        ({"tokens": [5]}, "r: tokens 1 is 2 before and 1 after"),
        ({"logprobs": NEARLY}, "r: logprobs 0 is [5, -0.5, "),
        ({"prompt logprobs": []}, "r: prompt logprobs 0 is 1 before and 0 after"),
        ({"finish reason": "length"}, "r: finish reason is stop before and length after"),
        ({"stop id": None}, "r: stop id is 3 before and None after"),
    ],
)
def test_the_first_difference_is_told(changes: dict[str, Any], told: str) -> None:
    requests: list[Spec] = [{"request": {"request_id": "r", "prompt": [1], "sampling": {"seed": 9}}}]
    found = Comparison.of(requests, {"r": answer()}, {"r": answer(**changes)}, None)
    assert [str(difference)[: len(told)] for difference in found.differences] == ([told] if told else [])
    assert all(difference.seed == 9 for difference in found.differences)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(path)
    return path


def test_by_a_margin_only_close_calls_may_part(model_dir: Path) -> None:
    requests: list[Spec] = [{"request": {"request_id": "r", "prompt": [30, 40, 50], "sampling": {}}}]
    before, after = {"r": answer()}, {"r": answer(tokens=[5, 8])}
    assert Comparison.of(requests, before, after, MarginRule(1e-9, model_dir)).differences
    found = Comparison.of(requests, before, after, MarginRule(1e9, model_dir))
    assert (found.differences, found.excused) == ([], 1)
    nearly = {"r": answer(logprobs=NEARLY)}
    assert not Comparison.of(requests, before, nearly, MarginRule(1e-9, model_dir)).differences


def test_few_close_calls_are_excused(model_dir: Path) -> None:
    requests: list[Spec] = [
        {"request": {"request_id": name, "prompt": [30], "sampling": {}}} for name in ("one", "another")
    ]
    before = {name: answer() for name in ("one", "another")}
    after = {name: answer(tokens=[8, 8]) for name in ("one", "another")}
    found = Comparison.of(requests, before, after, MarginRule(1e9, model_dir))
    assert str(found.differences[0]) == "too many: excused is 0 before and 2 after"


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    assert median_interval(list(range(9))) == (1, 7)
    rng = random.Random(1)
    for count in (6, 9, 20):
        trials = [median_interval([rng.expovariate(1) for _ in range(count)]) for _ in range(2000)]
        held = sum(low <= 0.6931 <= high for low, high in trials) / len(trials)
        assert 0.94 <= held <= 0.99, f"{count} values: held in {held:.3f}"


@pytest.mark.parametrize(
    ("ratios", "target", "text", "passed"),
    [
        ([1.0] * 9, 0.98, "met", True),
        ([0.97] * 4 + [0.979] + [1.01] * 4, 0.98, "met: equal", True),
        ([0.96] * 9, 0.98, "MISSED, wanted 0.98", False),
        ([0.8] * 4 + [0.9] + [1.1] * 4, 0.98, "UNDECIDED: more pairs", False),
        ([1.0] * 9, 1.3, "MISSED, wanted 1.3", False),
        ([1.4] * 9, 1.3, "met", True),
    ],
)
def test_verdicts(ratios: list[float], target: float, text: str, passed: bool) -> None:
    verdict = Ratios([*ratios], [1.0] * len(ratios)).verdict(target)
    assert (verdict.text, verdict.passed) == (text, passed)
    assert verdict.final == ("UNDECIDED" not in text)


def test_targets_are_of_cells_that_there_are(tmp_path: Path) -> None:
    targets = cells.CONFIGS / "after-7724227.json"
    part = cells.parts_of(["divisi-demo"], ["short", "32k"], tmp_path, targets)[0]
    assert [(cell.title, cell.target) for cell in part.cells][:2] == [("decode 1", 1.5), ("decode 4", 1.5)]
    wrong = tmp_path / "wrong.json"
    for text, told in (
        ('{"bench-l": {}}', "'bench-l'; there are"),
        ('{"bench-s": {"decode 2": 1}}', "'decode 2' of be"),
    ):
        wrong.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=told):
            cells.parts_of(["divisi-demo"], ["short"], tmp_path, wrong)


def test_a_prompt_s_chunks_are_a_row_of_their_own() -> None:
    cell = pairs.Cell("decode", 1, 64, count=9, block=4, chunks=2, prompt="prefill").wanting({"prefill": 3, "other": 9})
    assert cell.rows == [("prefill", 3), ("decode", 0.98)]
    assert pairs.by_row(cell, [1.0, 2.0, 0.25, 0.5], "BEFORE") == [3.0, 0.75]
    with pytest.raises(SystemExit, match="decode: BEFORE took 5 blocks of steps, not 4"):
        pairs.by_row(cell, [1.0, 2.0, 1.0, 0.25, 0.5], "BEFORE")


# Against real checkouts


def copy_of(checkout: Path, file: str, added: str) -> Path:
    """A checkout with something added to the end of a file; the rest are links to this one's."""
    for package in ("kernels", "model", "cluster", "deploy", "tests"):
        (checkout / package).symlink_to(ROOT / package)
    path = checkout
    for part in Path(file).parts[:-1]:
        path = path / part
        target = path.resolve()
        path.unlink()
        path.mkdir()
        for child in target.iterdir():
            (path / child.name).symlink_to(child)
    text = (ROOT / file).read_text(encoding="utf-8")
    (checkout / file).unlink()
    (checkout / file).write_text(f"{text}\n\n{added}\n", encoding="utf-8")
    return checkout


OTHER_TOKENS = """
import functools
Sampling.__init__ = functools.partialmethod(Sampling.__init__, frequency_penalty=2.0)
"""
LATE = """
import time
_plan = Engine.plan
Engine.plan = lambda engine: (time.sleep(0.1), _plan(engine))[1]
"""


@contextmanager
def processes(after: Path, threads: int = 1) -> Iterator[list[Inside]]:
    with inside([Checkout("BEFORE", ROOT), Checkout("AFTER", after)], threads) as found:
        yield found


def served_cases(model_dir: Path, shapes: Sequence[str], count: int) -> list[same.Case]:
    requests = Workload(ModelConfig.load(model_dir).vocab_size, FIELDS, 0).requests(count)
    return [same.Case(shape, "float32", requests) for shape in shapes]


@pytest.mark.verify
@pytest.mark.timeout(400)
def test_a_checkout_is_the_same_as_itself(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with processes(ROOT) as found:
        status = same.report(found, served_cases(model_dir, list(same.SHAPES), 80), model_dir, None)
    told = capsys.readouterr().out
    assert status == 0, told
    assert told.count("| identical |") == len(same.SHAPES)


@pytest.mark.verify
def test_a_planted_difference_is_found(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = copy_of(tmp_path, "cluster/request.py", OTHER_TOKENS)
    with processes(after) as found:
        status = same.report(found, served_cases(model_dir, ["local"], 80), model_dir, None)
    told = capsys.readouterr().out
    assert status == 1
    assert "DIFFERENT" in told
    assert "local, float32: first different request" in told


@pytest.mark.verify
def test_other_arithmetic_is_excused_by_a_margin_only(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = copy_of(tmp_path, "kernels/native/dense.py", "GEMM_ROWS = 4")
    plain = Workload(ModelConfig.load(model_dir).vocab_size, FIELDS, 0).requests(60, plain=True)
    case = same.Case("local", "float32", plain)
    with processes(after) as found:
        assert same.report(found, [case], model_dir, None) == 1
        assert same.report(found, [case], model_dir, MarginRule(1e-4, model_dir)) == 0
    told = capsys.readouterr().out
    assert "logprobs" in told, told


@pytest.mark.verify
def test_a_planted_delay_is_found(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = copy_of(tmp_path, "cluster/engine/engine.py", LATE)
    limits = {"num_pages": 64, "max_seqs": 4}
    part = pairs.Part("small", model_dir, limits, [pairs.Cell("decode 2", 2, 16, count=9, skip=1, block=4)])
    both = [Checkout("BEFORE", ROOT), Checkout("AFTER", after)]
    status = pairs.report(both, [part], pairs.Effort(pairs=6, most_pairs=6, threads=1))
    assert status == 1
    assert "MISSED, wanted 0.98" in capsys.readouterr().out


@pytest.mark.verify
def test_a_prompt_and_what_follows_are_timed_apart(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"num_pages": 64, "max_seqs": 4, "max_step_tokens": 32}
    cell = pairs.Cell("decode", 1, 64, count=9, block=4, chunks=2, target=0.0, prompt="prefill", prompt_target=0.0)
    both = [Checkout("BEFORE", ROOT), Checkout("AFTER", ROOT)]
    effort = pairs.Effort(pairs=6, most_pairs=6, threads=1)
    assert pairs.report(both, [pairs.Part("small", model_dir, limits, [cell])], effort) == 0
    told = capsys.readouterr().out
    assert "| small prefill | 6 |" in told
    assert "| small decode | 6 |" in told


@pytest.mark.verify
def test_no_speed_is_reported_of_wrong_tokens(model_dir: Path, tmp_path: Path) -> None:
    after = copy_of(tmp_path, "cluster/request.py", OTHER_TOKENS)
    part = pairs.Part("small", model_dir, {}, [pairs.Cell("decode 2", 2, 16, count=33, skip=1, block=4)])
    both = [Checkout("BEFORE", ROOT), Checkout("AFTER", after)]
    with pytest.raises(SystemExit, match="has other tokens; no speed is reported"):
        pairs.report(both, [part], pairs.Effort(pairs=6, most_pairs=6, threads=1))


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(SystemExit, match="--pairs is 5: fewer than 6"):
        pairs.main(Namespace(pairs=5))


def test_what_is_no_checkout_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"AFTER is .*, which has no folder kernels/: name the root of a checkout"):
        Checkout("AFTER", tmp_path)


@pytest.mark.verify
def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    after = copy_of(tmp_path, "cluster/request.py", "0 / 0")
    with pytest.raises(SystemExit, match=r"AFTER has ended with status 1(.|\n)*ZeroDivisionError"), processes(after):
        pass
