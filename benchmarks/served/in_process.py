"""The same requests in the engine alone: closed loop in this process, no Ray, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from divisi.cluster.assembly import build_engine, served_config
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.request import Request, Sampling
from divisi.cluster.spec import GangSpec


@dataclass
class Generated:
    """One answer. Times are in seconds since its request was made."""

    asked_at: float
    first_s: float = 0.0
    last_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)


class EngineAlone:
    """The engine that a server with this spec has, with all cores."""

    def __init__(self, spec: GangSpec) -> None:
        torch.set_num_threads(spec.threads or torch.get_num_threads())
        self._engine, experts = build_engine(spec, served_config(spec))
        assert experts is not None, "a gang without shards has its own experts"
        self._end = LocalEnd(experts)
        self._asked = 0

    def run(self, streams: Sequence[Sequence[Sequence[int]]], count: int) -> tuple[float, float, list[Generated]]:
        """Greedy answers of `count` tokens; of each stream, one prompt after another.

        Returns seconds by the clock, seconds of processor time, and the answers in the order they ended in.
        """
        left = [list(prompts) for prompts in streams]
        running: dict[str, tuple[int, Generated]] = {}
        done: list[Generated] = []
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(len(left)):
            self._ask(left, number, count, running)
        while (plan := self._engine.plan()) is not None:
            for event in self._engine.run(plan, self._end):
                number, answer = running[event.request_id]
                now = time.perf_counter() - answer.asked_at
                answer.first_s = answer.first_s or now
                answer.last_s = now
                answer.token_ids += event.token_ids
                if event.finish_reason is not None:
                    done.append(running.pop(event.request_id)[1])
                    if left[number]:
                        self._ask(left, number, count, running)
        return time.perf_counter() - started, time.process_time() - cpu, done

    def _ask(
        self, left: list[list[Sequence[int]]], number: int, count: int, running: dict[str, tuple[int, Generated]]
    ) -> None:
        self._asked += 1
        name = str(self._asked)
        running[name] = number, Generated(time.perf_counter())
        self._engine.submit(Request(name, tuple(left[number].pop(0)), count, Sampling(temperature=0.0)))
