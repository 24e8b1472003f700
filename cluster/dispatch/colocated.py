"""Dispatch among ranks that are attention worker and expert shard at once: `attention:i` holds the i-th share.

In a layer, a rank sends its rows to all peers, runs its own experts on the rows of all, sends every peer its rows of
the partial sum, and adds the partial sums of all shards for its own rows. A rank without rows serves its experts all
the same. All know from the step's header who has how many.

The order of summation is that of all modes, and so are the results, bit for bit.

Shapes: T rows, D model width, K experts per row, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from divisi.cluster.dispatch.broadcast import ShardBatch, ShardSum, wait_for
from divisi.cluster.dispatch.protocol import Experts, Peers, WorkerEnd
from divisi.cluster.dispatch.transport.groups import Transfer
from divisi.cluster.dispatch.wire import Transport
from divisi.cluster.passes import Pass

_Exchange = tuple[Callable[[Tensor, int], Transfer], Tensor, int]


@dataclass(frozen=True, slots=True)
class Colocated:
    """The mode of gangs whose every rank holds a share of the experts, here the one of its seat."""

    transport: Transport
    experts: Experts

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """See DispatchMode."""
        return ColocatedEnd(peers, self.experts, self.transport)


class ColocatedEnd:
    """One rank's end, both ways. Buffers are made once per epoch, views once per pass; one layer is under way."""

    def __init__(self, peers: Peers, experts: Experts, transport: Transport) -> None:
        wire, max_rows = transport.wire, transport.max_pass_rows
        self._seat, self._transport = peers.seat, transport
        layout = peers.layout_of(wire.leaves)
        self._group = peers.join(transport.largest(layout))
        self._ranks = dict(sorted(peers.workers.items()))
        self._requests_B = {seat: transport.buffer(wire.request_bytes(max_rows)) for seat in self._ranks}
        trees = [layout.subtrees(seat) for seat in layout.seats]
        self._sums = {seat: len(own) for seat, own in enumerate(trees)}
        self._replies_B = {
            seat: transport.buffer(wire.reply_bytes(max_rows, self._sums[seat]))
            for seat in self._ranks
            if seat != self._seat
        }
        self._batch = ShardBatch(experts, transport, len(self._ranks), self._sums[self._seat])
        self._sum = ShardSum(transport, trees)

    def begin(self, step_pass: Pass) -> None:
        """See WorkerEnd."""
        self._transport.check(step_pass)
        wire, own = self._transport.wire, step_pass.rows(self._seat)
        counts = {seat: rows for seat in self._ranks if (rows := step_pass.rows(seat))}
        requests = {seat: wire.request(self._requests_B[seat], rows) for seat, rows in counts.items()}
        self._batch.begin(list(requests.values()))
        self._own_request = requests.get(self._seat)
        outgoing = {} if self._own_request is None else dict.fromkeys(self._ranks, self._own_request.bytes_B)
        self._request_transfers = self._order(outgoing, {seat: request.bytes_B for seat, request in requests.items()})
        outgoing, incoming = dict(zip(requests, self._batch.replies_B, strict=True)), {}
        if own:
            sums = self._sums
            incoming = {seat: reply_B[: wire.reply_bytes(own, sums[seat])] for seat, reply_B in self._replies_B.items()}
            partials_B = incoming | {self._seat: outgoing[self._seat]}
            self._sum.begin([wire.reply(partials_B[seat], own, sums[seat]) for seat in self._ranks])
        self._reply_transfers = self._order(outgoing, incoming)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _ColocatedPending:
        """See `divisi.model.dispatcher.Dispatcher`. Raises StepAborted."""
        assert self._own_request is not None, "the header says how many rows a worker brings to a pass"
        self._own_request.write(x_TD, expert_ids_TK, gates_TK)
        return _ColocatedPending(self, layer, _start(self._request_transfers))

    def idle(self, layer: int) -> None:
        """Run this rank's experts for the peers. Raises StepAborted."""
        self.finish(layer, _start(self._request_transfers))

    def carried_all(self) -> bool:
        """See WorkerEnd."""
        return True

    def finish(self, layer: int, requests: list[Transfer]) -> None:
        """The other half of a layer: own experts on the rows of all, and everybody's partial sums on their way."""
        wait_for(requests, self._transport.deadline_s)
        self._batch.take_all()
        self._batch.run(layer)
        # The deadline begins anew: a peer may take as long for its experts as this one did.
        wait_for(_start(self._reply_transfers), self._transport.deadline_s)

    def sum(self) -> Tensor:
        """Of all shards' partial sums for this rank's rows, once the layer is finished."""
        return self._sum.add()

    def _order(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> list[_Exchange]:
        """The transfers with all peers, of what is given by seat.

        Of two ranks the one of the lower seat sends first and the other one receives first, so that both issue their
        transfers in the same order, which a backend that carries them out one after another (NCCL) needs.
        """
        transfers: list[_Exchange] = []
        for seat, rank in self._ranks.items():
            if seat == self._seat:
                continue
            sends = [(self._group.send, outgoing[seat], rank)] if seat in outgoing else []
            receives = [(self._group.recv, incoming[seat], rank)] if seat in incoming else []
            transfers += sends + receives if self._seat < seat else receives + sends
        return transfers


def _start(transfers: list[_Exchange]) -> list[Transfer]:
    return [start(data_B, rank) for start, data_B, rank in transfers]


@dataclass(frozen=True, slots=True)
class _ColocatedPending:
    end: ColocatedEnd
    layer: int
    requests: list[Transfer]

    def combine(self) -> Tensor:
        self.end.finish(self.layer, self.requests)
        return self.end.sum()
