"""What Kubernetes' network policies let through: a pod that a policy selects is open only as the policies say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Literal

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """An end of a flow; an address outside of the cluster has no labels, and is in no namespace."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = "models"
    address: str = "10.1.0.1"


def allowed(policies: Sequence[Policy], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection comes about: the source may send, and the target may take."""
    out = _open(policies, "Egress", source, target, port, protocol)
    return out and _open(policies, "Ingress", target, source, port, protocol)


def _open(
    policies: Sequence[Policy], way: Literal["Ingress", "Egress"], here: Pod, there: Pod, port: int, protocol: str
) -> bool:
    selecting = [policy for policy in policies if _selects(policy, way, here)]
    return not selecting or any(
        _peer(rule, "from" if way == "Ingress" else "to", policy, there) and _port(rule, port, protocol)
        for policy in selecting
        for rule in policy["spec"].get(way.lower()) or ()
    )


def _selects(policy: Policy, way: str, pod: Pod) -> bool:
    spec = policy["spec"]
    here = policy["metadata"].get("namespace", "models")
    return pod.namespace == here and way in spec["policyTypes"] and matches(spec["podSelector"], pod.labels)


def _port(rule: Policy, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return ports is None or any(
        item["port"] <= port <= item.get("endPort", item["port"]) and item.get("protocol", "TCP") == protocol
        for item in ports
    )


def _peer(rule: Policy, key: str, policy: Policy, pod: Pod) -> bool:
    return key not in rule or any(_is(peer, policy, pod) for peer in rule[key])


def _is(peer: Policy, policy: Policy, pod: Pod) -> bool:
    if block := peer.get("ipBlock"):
        inside = ip_address(pod.address) in ip_network(block["cidr"])
        return inside and not any(ip_address(pod.address) in ip_network(cut) for cut in block.get("except", ()))
    if pod.namespace is None:
        return False
    namespaces = peer.get("namespaceSelector")
    if namespaces is None:
        near = pod.namespace == policy["metadata"].get("namespace", "models")
    else:
        near = matches(namespaces, {"kubernetes.io/metadata.name": pod.namespace})
    return near and matches(peer.get("podSelector", {}), pod.labels)


def matches(selector: Policy, labels: Mapping[str, str]) -> bool:
    """Whether labels are those of a selector; an empty one takes all."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _satisfied(labels, labels.get(item["key"]), item) for item in selector.get("matchExpressions", ())
    )


def _satisfied(labels: Mapping[str, str], value: str | None, item: Policy) -> bool:
    match item["operator"]:
        case "In":
            return value in item["values"]
        case "NotIn":
            return value not in item["values"]
        case "Exists":
            return item["key"] in labels
        case "DoesNotExist":
            return item["key"] not in labels
    raise ValueError(item["operator"])
