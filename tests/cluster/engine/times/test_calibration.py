"""What an engine finds out before it serves: which steps it tries, the table they make, and the file it is kept in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.engine.times import times_file
from divisi.cluster.engine.times.cells import STEPS, Cell, Samples, cells
from divisi.cluster.engine.times.times_file import TimesFile, circumstances, code_version
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from divisi.cluster.step_times.measured import Measured, Reading
from divisi.model.demo import checkpoint_dir
from tests.support.model_steps import LayerByLayer
from tests.support.thread_gang import small_spec

LIMITS = SchedulerConfig(
    vocab_size=100, max_model_len=4096, num_pages=2000, page_size=8, num_slots=10, max_seqs=8, max_step_tokens=512,
    max_draft_tokens=3,
)  # fmt: skip


def test_cells_cover_what_is_served() -> None:
    found = list(cells(LIMITS))
    assert {cell.sequences for cell in found} == {1, 2, 4, 8}
    assert {cell.drafts for cell in found} == {0, 1, 2, 3}
    assert [(cell.drafts, cell.prompt) for cell in found if cell.prompt > 1] == [(0, 1024), (3, 1024)]


@pytest.mark.parametrize("tight", [{"num_pages": 40}, {"max_model_len": 16}, {"max_step_tokens": 8}])
def test_cells_have_room(tight: dict[str, int]) -> None:
    limits = LIMITS.model_copy(update=tight)
    found = list(cells(limits))
    assert 0 < len(found) < len(list(cells(LIMITS)))
    assert all(cell.fits(limits) for cell in found)


def test_the_table_of_samples() -> None:
    samples = Samples()
    for seconds in (3.0, 1.0, 2.0, 90.0, 2.0):
        samples.add(Cell(2, 1), seconds, [0.5])
    samples.add(Cell(2, 0), 1.5, [])
    assert samples.count(Cell(2, 1)) == 5
    assert samples.measured() == Measured({2: {2: 1.0, 1: 1.0}}, {2: 0.5}, first={2: 0.5})


def test_a_steps_first_draft_is_apart() -> None:
    samples = Samples()
    for sequences, first in ((1, 0.3), (1, 0.2), (4, 0.6), (8, 0.5)):
        samples.add(Cell(sequences, 2), 3.0, [first, 0.1])
    samples.add(Cell(1, 0), 1.0, [])
    assert samples.measured().first == {1: 0.2, 4: 0.5, 8: 0.5}
    assert samples.measured().draft == {1: 0.1, 4: 0.1, 8: 0.1}


def test_what_takes_longer_than_more_was_disturbed() -> None:
    samples = Samples()
    for cell, full, draft in (
        (Cell(1, 0), 1.0, []), (Cell(1, 1), 9.0, [0.9]), (Cell(1, 2), 3.0, [0.9]),
        (Cell(2, 0), 2.0, []), (Cell(2, 1), 2.5, [0.3]), (Cell(2, 2), 4.0, [0.3]),
    ):  # fmt: skip
        samples.add(cell, full, draft)
    full = {1: {1: 1.0, 2: 2.5, 3: 3.0}, 2: {1: 2.0, 2: 2.5, 3: 4.0}}
    assert samples.measured() == Measured(full, {1: 0.3, 2: 0.3}, first={1: 0.3, 2: 0.3})


def test_reading_is_what_a_long_prompt_adds() -> None:
    samples = Samples()
    for cell, full, draft in (
        (Cell(1, 0), 1.0, []), (Cell(1, 0, 101), 2.0, []),
        (Cell(1, 2), 1.5, [0.1, 0.1]), (Cell(1, 2, 101), 3.5, [0.2, 0.2]),
    ):  # fmt: skip
        samples.add(cell, full, draft)
    assert samples.measured().reading == pytest.approx((0.01, 0.005, 0.001))


def test_noise_makes_no_further_row_dearer_than_the_first() -> None:
    samples = Samples()
    for cell, full in ((Cell(1, 0), 1.0), (Cell(1, 0, 101), 1.0), (Cell(1, 2), 1.5), (Cell(1, 2, 101), 4.5)):
        samples.add(cell, full, [0.1] * cell.drafts)
    first, more, _ = samples.measured().reading
    assert first == pytest.approx(more) == pytest.approx(0.01)


def test_noise_makes_no_draft_dearer_to_read_for_than_all_layers() -> None:
    samples = Samples()
    for cell, full, draft in (
        (Cell(1, 0), 1.0, []), (Cell(1, 0, 101), 2.0, []),
        (Cell(1, 2), 1.5, [0.1, 0.1]), (Cell(1, 2, 101), 3.5, [9.0, 9.0]),
    ):  # fmt: skip
        samples.add(cell, full, draft)
    first, _, draft_row = samples.measured().reading
    assert draft_row == first == pytest.approx(0.01)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GangSpec:
    monkeypatch.setattr(times_file, "cache_folder", lambda: tmp_path / "cache")
    return small_spec(checkpoint_dir(), GangShape(1, 0), max_draft_tokens=2, max_seqs=2, max_model_len=256)


def started(spec: GangSpec) -> tuple[Engine, LocalEnd, int]:
    """An engine after all that it does by itself; how many steps that was."""
    engine, experts = build_engine(spec, served_config(spec))
    assert experts is not None
    end, steps = LocalEnd(experts), 0
    while (plan := engine.plan()) is not None:
        assert engine.run(plan, end) == []
        steps += 1
    return engine, end, steps


def test_an_engine_measures_once_and_remembers(spec: GangSpec) -> None:
    engine, end, steps = started(spec)
    assert steps > 2 * 3 * STEPS
    assert engine._times is not None
    measured = engine._times.measured
    assert {(sequences, each) for sequences, by_rows in measured.full.items() for each in by_rows} == {
        (sequences, each) for sequences in (1, 2) for each in (1, 2, 3)
    }
    assert set(measured.draft) == {1, 2}
    assert engine.stats().steps == engine.stats().generated_tokens == 0, "nobody asked for these"
    assert engine.stats().free_pages == engine.stats().total_pages
    again, _, steps = started(spec)
    assert steps == 0
    assert again._times is not None
    assert again._times.measured == measured
    engine.submit(Request("r", (1, 2, 3), 5, Sampling(temperature=0.0)))
    plan = engine.plan()
    assert plan is not None
    assert engine.run(plan, end)


def test_an_aborted_trial_is_run_again(spec: GangSpec) -> None:
    engine, experts = build_engine(spec, served_config(spec))
    assert experts is not None
    end, aborted = LocalEnd(experts), 0

    class Failing(LayerByLayer):
        def dispatch(self, *arguments: object) -> None:  # type: ignore[override]
            raise StepAborted("planted")

    while (plan := engine.plan()) is not None:
        if aborted < 5:
            aborted += 1
            with pytest.raises(StepAborted):
                engine.run(plan, Failing(experts))
        engine.run(plan, end)
    assert engine.stats().aborted_steps == 0
    assert engine._times is not None
    assert engine._times.is_known


@pytest.mark.parametrize(("settled_s", "each"), [(0.0, STEPS), (60.0, 20)])
def test_short_steps_are_taken_until_they_settle(
    spec: GangSpec, monkeypatch: pytest.MonkeyPatch, settled_s: float, each: int
) -> None:
    monkeypatch.setattr("divisi.cluster.engine.times.calibration._SETTLED_S", settled_s)
    taken: list[Cell] = []
    add = Samples.add
    monkeypatch.setattr(Samples, "add", lambda samples, cell, *times: (taken.append(cell), add(samples, cell, *times)))
    started(spec)
    counts = Counter(taken)
    assert {count % each for count in counts.values()} == {0}


def test_without_time_drafts_go_all_the_way(spec: GangSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divisi.cluster.engine.times.calibration._BUDGET_S", 0.0)
    engine, end, steps = started(spec)
    assert steps == 0
    assert not times_file.cache_folder().exists(), "the next start has another try"
    engine.submit(Request("r", (1, 2, 3), 9, Sampling(temperature=0.0)))
    plan = engine.plan()
    assert plan is not None
    engine.run(plan, end)
    plan = engine.plan()
    assert plan is not None
    assert plan.counts == (1, 1, 3)


MEASURED = Measured({1: {1: 1.0, 2: 1.5}}, {1: 0.1}, Reading(1e-6, 1e-7, 1e-8))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    file = TimesFile(tmp_path / "new", {"model": "a"})
    assert file.read() is None
    file.write(MEASURED)
    assert file.read() == MEASURED
    assert TimesFile(tmp_path / "new", {"model": "b"}).read() is None
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"]


@pytest.mark.parametrize("content", ["", "{", '{"key": {"model": "a"}, "full": {}, "draft": {}, "reading": [0, 0, 0]}'])
def test_a_file_that_says_nothing_is_ignored(tmp_path: Path, content: str) -> None:
    file = TimesFile(tmp_path, {"model": "a"})
    file.write(MEASURED)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert file.read() is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    TimesFile(tmp_path / "file" / "below", {"model": "a"}).write(MEASURED)
    assert "cannot be written" in caplog.text


def test_circumstances_are_told_apart(spec: GangSpec) -> None:
    known = circumstances(spec, 4)
    for other in (
        replace(spec, dtype="bfloat16"), replace(spec, shape=GangShape(1, 1)), replace(spec, deterministic=True),
        replace(spec, shape=GangShape(2, 2)), replace(spec, shape=GangShape(2, 2, colocated=True)),
        replace(spec, max_seqs=7), replace(spec, kernels="reference"),
    ):  # fmt: skip
        assert circumstances(other, 4) != known
    assert circumstances(spec, 5) != known
    assert circumstances(replace(spec, name="other"), 4) == known


def test_other_sources_are_another_version(tmp_path: Path) -> None:
    found = {code_version(), code_version(tmp_path / "nothing")}
    for number, name in enumerate(("kernels/passes/native.cpp", "kernels/native/simd.h", "cluster/engine/engine.py")):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_text(name)
        found.add(code_version(tmp_path / str(number)))
    assert len(found) == 5
