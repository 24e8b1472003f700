"""`divisi serve` whose steps compute nothing: the real actors, loop, streams and ingress, around a paced engine.

python -m divisi.benchmarks.http_cost.noop_worker STEP_MS serve MODEL_DIR ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.spec import GangSpec
from divisi.deploy import serve_app
from divisi.deploy.cli.main import main
from divisi.deploy.serve_app import AttentionWorker
from divisi.deploy.settings import LogSettings
from divisi.model.config import ModelConfig

_LATE_STEPS = 5
"""A loop that is held up catches up with so many steps, and forgets the rest."""
TOKENS = (b"a", b"b", b"c", b"d", b"e", b"f", b"g")
"""Every answer: these, again and again."""


class _Step:
    """A plan of one row."""

    counts = (1,)


class NoopEngine:
    """Implements `gang.worker_loop.StepEngine`: a token for every open answer, every `step_s` seconds."""

    def __init__(self, token_ids: tuple[int, ...], step_s: float) -> None:
        self._token_ids = token_ids
        self._step_s = step_s
        self._next_at = 0.0
        self._made: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self._events: list[TokenEvent] = []
        self._steps = self._tokens = 0

    def submit(self, request: Request) -> None:
        """See StepEngine."""
        self._made[request.request_id], self._wanted[request.request_id] = 0, request.max_tokens

    def cancel(self, request_id: str) -> None:
        """See StepEngine."""
        if self._made.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, (), None, finish_reason="cancelled"))

    def plan(self) -> _Step | None:
        """See StepEngine."""
        return _Step() if self._made else None

    def run_pass(self, plan: _Step, index: int, dispatcher: object) -> None:
        """Wait for the step's time."""
        now = time.monotonic()
        self._next_at = max(self._next_at + self._step_s, now - _LATE_STEPS * self._step_s)
        time.sleep(max(self._next_at - now, 0.0))

    def commit(self, plan: _Step) -> list[TokenEvent]:
        """See StepEngine."""
        events = []
        for name, made in list(self._made.items()):
            last = made + 1 == self._wanted[name]
            token = self._token_ids[made % len(self._token_ids)]
            events.append(TokenEvent(name, (token,), None, finish_reason="length" if last else None))
            self._made[name] = made + 1
            if last:
                del self._made[name]
        self._steps += 1
        self._tokens += len(events)
        return events

    def take_events(self) -> list[TokenEvent]:
        """See StepEngine."""
        events, self._events = self._events, []
        return events

    def fail_all(self, message: str) -> None:
        """Nothing fails here."""

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return EngineStats(len(self._made), 0, 0, 10**6, 10**6, 10**3, 10**3, self._steps, 0, 0, 0, self._tokens, {})


class NoopAttentionWorker(AttentionWorker):
    """Serve's deployment, with that engine."""

    step_s = 0.0

    def __init__(self, spec: GangSpec, log: LogSettings, grace_s: float) -> None:
        from divisi.cluster.ray import worker
        from divisi.model.text import TextCodec

        tokenizer = TextCodec.load(spec.model_dir).tokenizer
        ids = tuple(tokenizer.encode(token.decode())[0] for token in TOKENS)

        def build(spec: GangSpec, config: ModelConfig, *_: object) -> tuple[NoopEngine, object]:
            return NoopEngine(ids, self.step_s), object()

        worker.build_engine = build  # type: ignore[attr-defined, assignment]
        super().__init__(spec, log, grace_s)


def _serve(step_ms: float, arguments: list[str]) -> int:
    class Paced(NoopAttentionWorker):  # of __main__, so that it travels to the replica as it is
        step_s = step_ms / 1e3

    deployment: Callable[[type[Any]], Any] = serve_app._deployment

    def with_noop(of: type[Any]) -> Any:
        return deployment(Paced if of is AttentionWorker else of).options(name=of.__name__)

    serve_app._deployment = with_noop
    return main(arguments)


if __name__ == "__main__":
    sys.exit(_serve(float(sys.argv[1]), sys.argv[2:]))
