"""What Ray is told of a choice, and what it says of an autoscaler."""

from __future__ import annotations

import json

import pytest

from divisi.cluster.nodes import NodeChoice
from divisi.cluster.ray import nodes
from divisi.cluster.ray.nodes import actor_options, has_autoscaler

_STATUS = (b"__autoscaling_status", None)
_V2 = (b"__autoscaler_v2_enabled", b"__autoscaler")


def status(*kinds: str) -> bytes:
    return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(kinds, 1)}}).encode()


@pytest.mark.parametrize(("kept", "found"), [
    ({}, False),
    ({_V2: b"1"}, True),
    ({_V2: b"0"}, False),
    ({_STATUS: b'{"load_metrics_report": {}}'}, False),
    ({_STATUS: b'{"autoscaler_report": null}'}, False),
    ({_STATUS: status(f"node_{'0a' * 28}")}, False),  # `ray start --head`, whose monitor manages nothing
    ({_STATUS: status("local.cluster.node")}, False),
    ({_STATUS: status("head-group", "attention")}, True),
])  # fmt: skip
def test_an_autoscaler_is_told_from_a_monitor(
    kept: dict[tuple[bytes, bytes | None], bytes], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_internal_kv_get", lambda key, namespace=None: kept.get((key, namespace)))
    assert has_autoscaler() is found


def test_options_name_what_is_chosen() -> None:
    assert actor_options(NodeChoice()) == {}
    assert actor_options(NodeChoice({"a": "b"})) == {"label_selector": {"a": "b"}}
    assert actor_options(NodeChoice({}, {"rack": 2.0})) == {"resources": {"rack": 2.0}}
