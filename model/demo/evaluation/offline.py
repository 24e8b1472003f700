"""What needs the weights, not a server: how often drafts agree with the model, and how evenly its routers route."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.model.demo.batches import Batches, Taste, Writer
from divisi.model.demo.network import Network

_WIDTHS, _TOKENS = (128, 256, 384, 512), 2048


@dataclass(frozen=True, slots=True)
class Findings:
    """Shares between 0 and 1, by draft and by layer; the last layer is the MTP layer."""

    agreement: list[float]
    """Of drafts 1, 2, ... with the model's own choice, on the assistant's tokens; right only if those before are."""
    agreement_anywhere: list[float]
    """The same on all tokens of the conversations, those of users too, each draft for itself."""
    imbalance: list[float]
    """Tokens of the busiest expert over the mean, by layer."""
    least_used: float
    """Share of the choices that fell on the least used expert of any layer, times the number of experts."""


@torch.no_grad()
def look_inside(network: Network, writer: Writer, batches: int, depth: int = 3) -> Findings:
    """Measure on held-out conversations, teacher-forced."""
    said, anywhere, loads = [], [], []
    source = Batches(writer, "offline", Taste("held_out"))
    for index in range(batches):
        batch = source.take(_WIDTHS[index % len(_WIDTHS)], _TOKENS)
        context = network.context(batch.real)
        hidden = network.hidden(batch.ids, context)
        own = network.head(hidden).argmax(-1)
        outs = network.drafts(batch.ids, hidden, context, depth)
        count = outs[0].shape[1]
        hits = torch.stack(
            [network.head(out).argmax(-1) == own[:, d : d + count] for d, out in enumerate(outs, start=1)]
        )
        weights = batch.weights[:, 1:]
        inside, known = torch.ones_like(hits), torch.ones_like(hits)
        for d in range(1, depth + 1):
            at = slice(d, d + count)
            inside[d - 1] = _padded(weights, at, count) == 1.0
            known[d - 1] = _padded(weights, at, count) > 0
        # A draft is of use only where those before it were taken, and where all of them are the assistant's
        taken = hits.cumprod(0).bool()
        all_said = inside.cumprod(0).bool()
        said.append(torch.stack([_count(taken[d], all_said[d]) for d in range(depth)]))
        anywhere.append(torch.stack([_count(hits[d], known[d]) for d in range(depth)]))
        loads.append(torch.stack(context.load.share_LE))
    share_LE = torch.stack(loads).mean(0)
    experts = share_LE.shape[1]
    return Findings(
        _rates(said), _rates(anywhere), (share_LE.max(1).values * experts).tolist(), float(share_LE.min() * experts)
    )


def _padded(weights: Tensor, at: slice, count: int) -> Tensor:
    part = weights[:, at]
    return torch.nn.functional.pad(part, (0, count - part.shape[1]))


def _count(hits: Tensor, where: Tensor) -> Tensor:
    where = where.bool()
    return torch.stack([(hits.bool() & where).sum(), where.sum()])


def _rates(counts: list[Tensor]) -> list[float]:
    total = torch.stack(counts).sum(0)
    return (total[:, 0] / total[:, 1]).tolist()
