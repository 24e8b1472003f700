"""One server per topology, shared by all clients, and what runs a client against it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from divisi.model.demo import checkpoint_dir
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.clients.environments import NotInstallableError, environment, node_environment
from tests.clients.likelihood import Choice, choices, oracle
from tests.e2e.conftest import Cluster, running_cluster

TOPOLOGIES = {
    "local": ("--topology", "local"),
    "colocated": ("--topology", "colocated", "--attention-workers", "2"),
    "split": ("--topology", "split", "--attention-workers", "2", "--expert-shards", "2"),
}
SIZES = ("--kv-memory", "32MiB", "--max-seqs", "8", "--max-model-len", "512", "--dtype", "float32", "--device", "cpu")
DEMO_SIZES = ("--kv-memory", "64MiB", "--max-seqs", "4", "--max-model-len", "16384", "--device", "cpu")
MODEL = "small"
CLIENT_TIMEOUT_S = 240
READY_WITHIN_S = 240.0
"""Long, since other work may share the machine; a client that hangs is still found."""


@dataclass(frozen=True)
class Bench:
    """A running server and an empty folder for one client's files."""

    topology: str
    url: str
    model_dir: Path
    folder: Path
    model: str = MODEL

    def run(
        self,
        client: str,
        program: str,
        *arguments: object,
        online: bool = False,
        hooks: Path | None = None,
        timeout_s: float = CLIENT_TIMEOUT_S,
    ) -> str:
        """Run `program` of a client's environment in the folder and return its output.

        Skips where the client cannot be installed; fails where it ends with an error or does not end.
        """
        try:
            command = [str(environment(client) / program), *map(str, arguments)]
        except NotInstallableError as error:
            pytest.skip(f"{client} cannot be installed here: {error}")
        return self._output(client, command, self._variables(online, hooks), timeout_s)

    def run_node(self, client: str, program: Path, *arguments: object, timeout_s: float = CLIENT_TIMEOUT_S) -> str:
        """The same for a program of JavaScript, which finds its packages beside it."""
        try:
            packages = node_environment(client)
        except NotInstallableError as error:
            pytest.skip(f"{client} cannot be installed here: {error}")
        (self.folder / "node_modules").symlink_to(packages / "node_modules")
        copied = self.folder / program.name
        copied.write_bytes(program.read_bytes())
        command = [str(shutil.which("node")), str(copied), *map(str, arguments)]
        return self._output(client, command, self._variables(False, None), timeout_s)

    def _output(self, client: str, command: Sequence[str], variables: Mapping[str, str], timeout_s: float) -> str:
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=variables, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            output = (error.output or b"").decode(errors="replace")
            pytest.fail(f"{client} hung for {timeout_s} s; its output ends with:\n{output[-3000:]}", pytrace=False)
        if done.returncode != 0:
            pytest.fail(f"{client} ended with status {done.returncode}:\n{done.stdout[-5000:]}", pytrace=False)
        return done.stdout

    def _variables(self, online: bool, hooks: Path | None) -> dict[str, str]:
        """The environment of a client that has no account, no hub and no home of the user's."""
        offline = {} if online else {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        offline |= {} if online else {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        own = {"HOME": str(self.folder), "HF_HOME": str(self.folder / "hf"), "SERVED_MODEL": self.model}
        keys = {"OPENAI_API_KEY": "none", "DIVISI_API_KEY": "none"}
        loaded = {} if hooks is None else {"SCHEMATHESIS_HOOKS": hooks.stem, "PYTHONPATH": str(hooks.parent)}
        return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **offline, **own, **keys, **loaded}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / MODEL
    write_random_checkpoint(folder, SMALL_CONFIG, seed=5)
    return folder


@pytest.fixture(scope="session")
def expected(model_dir: Path) -> dict[Choice, float]:
    """Log-likelihood of each choice of the lm-eval task, by transformers."""
    return oracle(model_dir, choices(Path(__file__).parent / "tasks" / "choice.jsonl"))


@pytest.fixture(scope="session", params=TOPOLOGIES)
def server(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[
    tuple[str, Cluster]
]:  # fmt: skip
    """One topology's name and server; every client calls it before the next topology starts."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    arguments = (*TOPOLOGIES[request.param], *SIZES)
    with running_cluster(model_dir, log, *arguments, ready_within_s=READY_WITHIN_S) as cluster:
        yield request.param, cluster


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The demo model, split: it calls tools, and its context holds the prompts of agents."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running_cluster(
        checkpoint_dir(), log, *TOPOLOGIES["split"], *DEMO_SIZES, ready_within_s=READY_WITHIN_S
    ) as cluster:
        yield cluster


@pytest.fixture
def demo(demo_server: Cluster, tmp_path: Path) -> Iterator[Bench]:
    """The demo model's server; it must still be ready when the client is done."""
    yield Bench("split", demo_server.url, checkpoint_dir(), tmp_path, model="divisi-demo")
    demo_server.wait_until_ready(30)


@pytest.fixture
def bench(server: tuple[str, Cluster], model_dir: Path, tmp_path: Path) -> Iterator[Bench]:
    """The server of this topology; it must still be ready when the client is done."""
    topology, cluster = server
    yield Bench(topology, cluster.url, model_dir, tmp_path)
    cluster.wait_until_ready(30)


def replies(bench: Bench) -> Counter[tuple[str, str]]:
    """How many replies of each path and status the server has counted."""
    found: Counter[tuple[str, str]] = Counter()
    text = httpx.get(f"{bench.url}/metrics", timeout=30).text
    for labels, count in re.findall(r"^divisi_http_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[values["path"], values["status"]] += int(float(count))
    return found
