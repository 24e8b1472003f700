"""Which nodes of a cluster take the processes of a role. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """A living node: its labels, all of its resources, taken or not, and Ray's name for it."""

    labels: Mapping[str, str]
    resources: Mapping[str, float]
    name: str = ""


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Nodes with all of these labels, of whose resources each process takes so much. By default any node."""

    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)

    def admits(self, node: Node) -> bool:
        """Whether a process could ever be on the node."""
        labelled = all(node.labels.get(name) == value for name, value in self.labels.items())
        return labelled and all(node.resources.get(name, 0.0) >= amount for name, amount in self.resources.items())

    def __bool__(self) -> bool:
        return bool(self.labels or self.resources)

    def __str__(self) -> str:
        labels = [f"the label {name}={value}" for name, value in self.labels.items()]
        return " and ".join(labels + [f"{amount:g} of the resource {name}" for name, amount in self.resources.items()])


@dataclass(frozen=True, slots=True)
class Placement:
    """A choice for each role."""

    ingress: NodeChoice = NodeChoice()
    """The ingress replicas; of its labels alone also what owns the gang, and its coordinator."""
    attention: NodeChoice = NodeChoice()
    experts: NodeChoice = NodeChoice()


def second_home(own: str, choice: NodeChoice, nodes: Iterable[Node]) -> str | None:
    """Another node than `own` that a process could be on, or None: the same for all who ask, but that node itself."""
    return min((node.name for node in nodes if node.name != own and choice.admits(node)), default=None)


def empty_groups(placement: Placement, shards: int, nodes: Iterable[Node]) -> list[str]:
    """What has nowhere to go, for people, by the name of its setting; `shards`: processes that only hold experts."""
    known = list(nodes)
    roles = {"ingress": placement.ingress, "attention": placement.attention}
    if shards:
        roles["experts"] = placement.experts
    return [
        f"placement.{role}: no node of the cluster has {choice}"
        for role, choice in roles.items()
        if choice and not any(choice.admits(node) for node in known)
    ]
