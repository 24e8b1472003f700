"""The engine alone, and the check of a server against it, with a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from divisi.benchmarks.served.answer import Answer
from divisi.benchmarks.served.cells import ANSWER_TOKENS, Mix, of_burst, of_engine, with_clocks
from divisi.benchmarks.served.in_process import EngineAlone
from divisi.benchmarks.served.load import Burst
from divisi.deploy.serve_app import gang_spec
from divisi.deploy.settings import Settings
from divisi.model.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EngineAlone:
    folder: Path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder)
    groups = {"model": {"model_dir": folder}, "cache": {"max_seqs": 4}, "gang": {"threads_per_process": 1}}
    return EngineAlone(gang_spec(Settings.load(None, groups), 0))


def test_streams_ask_one_prompt_after_another(engine: EngineAlone) -> None:
    prompts = Mix(2, 5, 2).prompts(0, 1000)
    _, _, answers = engine.run(prompts, 6)
    assert [len(answer.token_ids) for answer in answers] == [6] * 4
    assert all(0 < answer.first_s < answer.last_s for answer in answers)
    _, _, (alone,) = engine.run([[prompts[0][0]]], 6)
    assert alone.token_ids in [answer.token_ids for answer in answers]


def test_the_figures_of_the_engine(engine: EngineAlone) -> None:
    figures = of_engine(engine, Mix(1, 4, 1).prompts(0, 1000))
    assert set(figures) == {"rate", "gap", "first", "engine"}
    assert min(figures.values()) > 0


def test_the_figures_of_a_burst_and_what_it_cost() -> None:
    answer = Answer(0.5, 0.5 + (ANSWER_TOKENS - 1) * 0.01, 0.02, ANSWER_TOKENS, ANSWER_TOKENS, "")
    burst = Burst(2.0, 0.128, ((answer,), (answer,)))
    parts = ("engine", "plan", "loop", "threads", "shards", "ingress", "front", "other")
    clocks = [dict.fromkeys(parts, 1.0), dict.fromkeys(parts, 1.256)]
    figures = with_clocks(lambda: clocks.pop(0), lambda: burst)
    assert figures["rate"] == ANSWER_TOKENS
    assert figures["gap"] == pytest.approx(10.0)
    assert figures["first"] == 500.0
    assert figures["client"] == pytest.approx(0.5)
    assert figures["ingress"] == pytest.approx(1.0)
    assert figures["beyond"] == pytest.approx(3.0)


def test_a_short_answer_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="has 5 tokens in place of 128"):
        of_burst(Burst(1.0, 1.0, ((Answer(0.1, 0.2, 0.1, 5, 5, ""),),)))
