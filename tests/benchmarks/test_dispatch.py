"""The constants of the planner's model, from times that the model itself has made."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from divisi.benchmarks.dispatch import constants
from divisi.benchmarks.dispatch.layers import Case, Times, Work, load_of
from divisi.cluster.dispatch.planner import Link, layer_s

_LINK = Link(1e-4, 2e-5, bytes_per_s=2e9, pick_s=3e-4, picked_bytes_per_s=5e9, count_s=1e-4)


def test_constants_are_those_of_the_link_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who spends what on bytes is not asked, only how long they take in all."""

    def measure(work: Work) -> dict[Case, Times]:
        found = {}
        for mode in work.modes:
            for rows in work.rows:
                exact, copying_s = mode == "all_to_all", rows * 7e-6
                worker_s = _LINK.message_s + exact * _LINK.pick_s + copying_s
                shard_s = _LINK.message_s + exact * _LINK.count_s + copying_s
                found[mode, rows] = Times(layer_s(mode, load_of(work.shape, rows), _LINK), worker_s, shard_s)
        return found

    monkeypatch.setattr(constants, "measure", measure)
    assert astuple(constants.link(1, sleeps=False)) == pytest.approx(astuple(_LINK))
