"""Which virtual shard is to be served elsewhere so that experts' load is shared more evenly: one move, or one swap.

Whole virtual shards go, in all layers. Plain data, no clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from divisi.model.placement import Layout

LEAST_GAIN = 0.05
"""Of the mean load, for the busiest seat; less is not worth an epoch."""
_AS_GOOD = 0.05
"""Of the mean load: what else a step costs decides between those that differ by no more."""


def shares(layout: Layout, load: Sequence[float]) -> list[float]:
    """Each seat's load over the mean; `load` is by virtual shard. All 1 where there is none."""
    mean = sum(load) / len(layout.served)
    return [sum(load[leaf] for leaf in own) / mean if mean else 1.0 for own in layout.served]


def most_leaves(leaves: int, seats: int) -> int:
    """So many virtual shards one of so many seats may serve: half as many again as its even share."""
    share = -(-leaves // seats)
    return share + (share + 1) // 2


def better(layout: Layout, load: Sequence[float], held: Mapping[int, Collection[int]]) -> Layout | None:
    """The layout after the best step from the busiest seat to the idlest that helps; None where nothing does.

    Of steps that help about as much, the one that loads less (`held`: what each seat holds), leaves fewer subtrees, or
    moves less.
    """
    seats = shares(layout, load)
    mean = sum(load) / len(seats) or 1.0
    giver = max(range(len(seats)), key=seats.__getitem__)
    for taker in sorted(set(range(len(seats))) - {giver}, key=seats.__getitem__):
        highest = {
            step: max(seats[giver] - step.load / mean, seats[taker] + step.load / mean)
            for step in _steps(layout, load, giver, taker)
        }
        if (best := min(highest.values(), default=seats[giver])) <= (worst := seats[giver] - LEAST_GAIN):
            able = [step for step in highest if highest[step] <= min(best + _AS_GOOD, worst)]
            return min(able, key=lambda step: (*_cost(layout, step, held), highest[step])).after(layout)
    return None


@dataclass(frozen=True, slots=True)
class _Step:
    """A virtual shard goes from one seat to another, for which one of that seat may come back."""

    giver: int
    taker: int
    leaf: int
    back: int | None
    load: float
    """That the taker has more."""

    def after(self, layout: Layout) -> Layout:
        served = [set(own) for own in layout.served]
        for leaf, source, target in ((self.leaf, self.giver, self.taker), (self.back, self.taker, self.giver)):
            if leaf is not None:
                served[source].remove(leaf)
                served[target].add(leaf)
        return Layout(layout.leaves, tuple(tuple(sorted(own)) for own in served))


def _steps(layout: Layout, load: Sequence[float], giver: int, taker: int) -> Iterator[_Step]:
    """All that make the giver's load less: moves where neither has too many then, or nothing, and swaps."""
    own, other = layout.served[giver], layout.served[taker]
    may_move = len(own) > 1 and len(other) < most_leaves(layout.leaves, len(layout.served))
    for leaf in own:
        if may_move:
            yield _Step(giver, taker, leaf, None, load[leaf])
        for back in other:
            if load[leaf] > load[back]:
                yield _Step(giver, taker, leaf, back, load[leaf] - load[back])


def _cost(layout: Layout, step: _Step, held: Mapping[int, Collection[int]]) -> tuple[int, int, int]:
    after = step.after(layout)
    pair = (step.giver, step.taker)
    loaded = sum(leaf not in held.get(seat, ()) for seat in pair for leaf in after.served[seat])
    return loaded, sum(len(after.subtrees(seat)) for seat in pair), 1 + (step.back is not None)
