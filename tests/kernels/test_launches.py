"""What a decode step launches at the published sizes, on fake CUDA tensors: see tests/support/decode_launches.py.

No proof of graph capture, and the vendor's products may launch a second kernel that splits the sum.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.test_triton import run

Step = dict[str, Any]
MOST = {"delta": 12, "attention": 14}
ARCHS = [pytest.param(80, marks=pytest.mark.verify), 90, pytest.param(100, marks=pytest.mark.verify)]


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> int:
    """A chip, by its capability."""
    return int(request.param)


@pytest.fixture(scope="module")
def steps(arch: int) -> dict[str, list[Step]]:
    """Of each kind of step two, after one that made room: other lengths, other drafts that stood, fewer sequences."""
    found: dict[str, list[Step]] = json.loads(run(sys.executable, "-m", "tests.support.decode_launches", str(arch)))
    return found


def test_a_layer_takes_few_launches(
    arch: int, steps: dict[str, list[Step]], record_result: Callable[[str, object], None]
) -> None:
    for name, (step, _) in steps.items():
        layers = by_layer(step)
        for index, launches in enumerate(layers):
            kind = "attention" if index % 4 == 3 else "delta"
            listed = ", ".join(launches)
            print(f"sm_{arch}, {name}, {kind}: {len(launches)}: {listed}")
            record_result(f"sm_{arch}, {name}, layer {index}, {kind}", f"{len(launches)}: {listed}")
            assert len(launches) <= MOST[kind], f"{name}: {launches}"


def test_two_steps_launch_the_same_at_the_same_addresses(steps: dict[str, list[Step]]) -> None:
    for name, (first, second) in steps.items():
        assert first["sequences"] > second["sequences"], "in one bucket"
        assert {*map(int.__sub__, second["starts"], first["starts"])} == ({1, 2, 3, 4} if "drafts" in name else {1})
        one, two = inside(first), inside(second)
        assert [launch["name"] for launch in one if "name" in launch].count("torch.mm") == 4 * 4 + 1, name
        assert one == two, name
        assert first["compiled"] == second["compiled"] == 0, name


def test_nothing_waits_copies_or_takes_memory_within_the_layers(steps: dict[str, list[Step]]) -> None:
    for name, pair in steps.items():
        for step in pair:
            assert step["faults"] == [], name


def test_kernels_specialise_into_few_variants_and_into_none_after_the_first_steps(arch: int) -> None:
    """By the ends of a bucket: one sequence and many, short ones and long ones, without drafts and with."""
    found = json.loads(run(sys.executable, "-m", "tests.support.decode_variants", str(arch)))
    assert len(found["variants"]) >= 12
    assert {name: count for name, count in found["variants"].items() if count > 2} == {}
    assert found["later"] == []


def inside(step: Step) -> list[Step]:
    """From the first layer to the logits."""
    launches: list[Step] = step["launches"]
    return launches[next(i for i, launch in enumerate(launches) if "mark" in launch) :]


def by_layer(step: Step) -> list[list[str]]:
    """The names of each layer's launches; the norm that adds a layer's result opens the next one."""
    layers: list[list[str]] = [[]]
    for launch in inside(step)[1:]:
        if launch.get("mark") == "experts":
            layers.append([])
        elif "name" in launch:
            layers[-1].append(launch["name"])
    return layers[:-1]
