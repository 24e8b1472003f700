"""What the demo model gets right: held-out questions over HTTP, its drafts, its routers. The report is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.evaluation.cases import SKILLS
from tests.e2e.conftest import running_cluster

pytestmark = [pytest.mark.verify, pytest.mark.timeout(2400)]

RESULTS = Path(__file__).parent.parent / "results" / "demo.json"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    sizes = ("--device", "cpu", "--kv-memory", "256MiB", "--max-seqs", "16")
    with running_cluster(checkpoint_dir(), log, *sizes) as cluster:
        command = [sys.executable, "-m", "divisi.model.demo", "evaluate", "--url", cluster.url, "--out", str(RESULTS)]
        subprocess.run(command, check=True, timeout=2300)
    loaded: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return loaded


# Some below what the weights reached when they were shipped. The aim is 0.9 each: model/demo/README.md has the table.
FLOORS = {
    "call": 0.74,
    "parallel calls": 0.6,
    "strict call": 0.75,
    "abstention": 0.9,
    "tool answer": 0.9,
    "recall 1k": 0.9,
    "recall 4k": 0.9,
    "recall 8k": 0.88,
    "chat": 0.95,
}


@pytest.mark.parametrize("skill", FLOORS)
def test_skills(report: dict[str, Any], record_result: Record, skill: str) -> None:
    found = report["skills"][skill]
    record_result(skill, f"{found['right']} of {found['cases']}")
    assert found["cases"] >= 200
    assert found["right"] >= FLOORS[skill] * found["cases"]


def test_every_skill_is_reported(report: dict[str, Any], record_result: Record) -> None:
    assert report["skills"].keys() == SKILLS.keys()
    for skill, found in report["skills"].items():
        record_result(skill, f"{found['right']} of {found['cases']}")


def test_drafts_agree_with_the_model(report: dict[str, Any], record_result: Record) -> None:
    agreement = report["mtp and routing"]["agreement"]
    record_result("draft agreement", [round(share, 3) for share in agreement])
    assert agreement[0] >= 0.80
    assert agreement[1] >= 0.65
    assert agreement[2] >= 0.50


def test_every_expert_is_used(report: dict[str, Any], record_result: Record) -> None:
    routing = report["mtp and routing"]
    record_result("load imbalance by layer", [round(value, 2) for value in routing["imbalance"]])
    assert routing["least_used"] > 0.0
