"""What open streams see of a dead shard whose experts are held by another one, too, and of which there is no spare."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from divisi.model.demo import checkpoint_dir

from .conftest import Cluster, running_cluster
from .test_deaths import SHAPE, SIZES, kill, measure, of, texts  # noqa: F401 - fixtures
from .test_serve_split import metric, wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

SETTINGS = """
[gang]
expert_copies = 1
spare_shards = false
"""


@pytest.fixture
def spares() -> int:
    return 0


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("server")
    (config := folder / "divisi.toml").write_text(SETTINGS)
    flags = (*SHAPE, *SIZES, "--config", str(config))
    with running_cluster(checkpoint_dir(), folder / "log.txt", *flags, ready_within_s=180.0) as cluster:
        wait_for(lambda: metric(cluster, "seats_filled") == [4.0], 60, "not everybody is there")
        yield cluster


def test_a_killed_shard_is_served_by_the_other(
    gang: Cluster,
    measure: Callable[[str, Callable[[], None]], float],  # noqa: F811
) -> None:
    assert measure("with copies, shard killed", kill(gang, "ExpertShardActor")) <= 0.5


def test_a_hung_shard_is_served_by_the_other(
    gang: Cluster,
    measure: Callable[[str, Callable[[], None]], float],  # noqa: F811
) -> None:
    hung: list[psutil.Process] = []

    def blow() -> None:
        hung.append(of(gang, "ExpertShardActor")[0])
        hung[-1].send_signal(signal.SIGSTOP)

    assert measure("with copies, shard stopped for good", blow) <= 3.0
    wait_for(lambda: not any(process.is_running() for process in hung), 10, "it hangs still")
