"""Every number of `Sampling` has an effect: it is offered by the API, bounded, documented, and reaches the sampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from divisi.cluster.engine.request_check import check_request
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.engine.step.parameters import sequence_sampling
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import SAMPLING_LIMITS, Request, Sampling
from divisi.deploy.api.body.sampling_fields import SamplingFields

NUMBERS = [field.name for field in dataclasses.fields(Sampling) if field.type in ("float", "int")]
README = Path(__file__).parents[4] / "deploy" / "api" / "README.md"


def request(**sampling: float) -> Request:
    return Request("a", (1, 2), 3, Sampling(**sampling))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_offered_and_documented(name: str) -> None:
    assert name in SamplingFields.model_fields
    assert name in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("top_k", "seed")])
def test_a_number_is_bounded(name: str) -> None:
    assert name in SAMPLING_LIMITS
    with pytest.raises(RequestRejected, match=name):
        check_request(request(**{name: float("nan")}), 10)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_reaches_the_sampler(name: str) -> None:
    value = 0.5 if name not in ("top_k", "seed") else 7
    given = Sequence(request(**{name: value}), 0, [1, 2], 5)
    left_out = Sequence(request(), 0, [1, 2], 5)
    ours, defaults = (dataclasses.replace(sequence_sampling(each), history=None) for each in (given, left_out))
    assert ours != defaults
