from __future__ import annotations

from pathlib import Path

import pytest

from divisi.cluster.request import Request, Sampling
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint


@pytest.fixture(autouse=True)
def importable_in_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a spawned process find the tests' modules, without the repository's root on its path."""
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_checkpoint(path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    return path


@pytest.fixture(scope="session")
def requests() -> list[Request]:
    # No choice of these is close: 6e-4 lies between the best two of the closest, and sums in another order move 1e-5.
    return [
        Request(f"r{i}", tuple(range(5 + 3 * i, 12 + 13 * i)), 24, Sampling(temperature=float(i % 2), seed=20 + i))
        for i in range(5)
    ]
