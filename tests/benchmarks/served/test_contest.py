"""The whole measurement of HTTP rows, with a small model served in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from divisi.benchmarks.model import fill_vocabulary
from divisi.benchmarks.served.cells import mixes
from divisi.benchmarks.served.load import LoadGenerator
from divisi.benchmarks.served.report import ALONE, OURS, Contest, cost_table, speed_table, verdicts
from divisi.deploy.api import ApiSettings
from divisi.model.random_checkpoint import write_random_checkpoint
from divisi.model.text import TextCodec
from tests.deploy.api.fake_engine import serve
from tests.support.local_client import local_client


@dataclass
class ServerHere:
    """In the place of a RunningServer; its parts need a ms for each reading of their clocks."""

    url: str
    read: int = 0

    def clocks(self) -> dict[str, float]:
        self.read += 1
        parts = ("engine", "plan", "loop", "threads", "shards", "ingress", "front", "other")
        return dict.fromkeys(parts, self.read / 1e3)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cells", "report"):
        monkeypatch.setattr(f"divisi.benchmarks.served.{module}.ANSWER_TOKENS", 6)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    config = write_random_checkpoint(tmp_path)
    fill_vocabulary(tmp_path / "tokenizer.json", config.vocab_size)
    return tmp_path


def test_a_contest(model_dir: Path) -> None:
    settings = ApiSettings(served_model_name="here", max_model_len=2048)
    with (
        local_client(model_dir) as client,
        serve(client, TextCodec.load(model_dir), settings) as url,  # type: ignore[arg-type]
        LoadGenerator() as load,
    ):
        server = ServerHere(url)
        contest = Contest(server, load, model_dir, 4, {"peer": url})  # type: ignore[arg-type]
        contest.check()
        table = contest.measure(mixes([1, 2], [16]), rounds=2)
        assert server.read == 2 * (2 + 2 * 2)  # two mixes of warm-up, and in each round
    for row in table.values():
        assert set(row) == {OURS, "peer", ALONE}
        assert all(len(figures.rounds) == 2 for figures in row.values())
        assert row[OURS].median("ingress") > 0
    assert speed_table(table).count("\n") == 1 + 2 * 3
    assert cost_table(table).count("\n") == 1 + 2
    assert "1 stream: ms between tokens" in verdicts(table)


def test_an_answer_that_is_not_the_engines_stops_everything(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The server has other weights than it should."""
    other = tmp_path_factory.mktemp("other")
    config = write_random_checkpoint(other, seed=1)
    fill_vocabulary(other / "tokenizer.json", config.vocab_size)
    settings = ApiSettings(served_model_name="here", max_model_len=2048)
    with (
        local_client(other) as client,
        serve(client, TextCodec.load(other), settings) as url,  # type: ignore[arg-type]
        LoadGenerator() as load,
    ):
        contest = Contest(ServerHere(url), load, model_dir, 4, {})  # type: ignore[arg-type]
        with pytest.raises(SystemExit, match="the engine's"):
            contest.check()
