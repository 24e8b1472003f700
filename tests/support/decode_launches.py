"""`python -m tests.support.decode_launches ARCH`: the launches of decode steps at the published sizes; JSON.

Four layers of the 80 B model, three of them Gated DeltaNet, on fake CUDA tensors: the production host code runs whole,
every Triton launch is compiled and recorded by the stub driver, and every other operation on the device is counted as a
launch of its own. What would wait for the device, copy to the host or take memory within the layers is recorded too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import EmptyCheckpoint
from divisi.benchmarks.gpu.shapes import PUBLISHED
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step import batch, int_buffer
from divisi.cluster.engine.step.batch import BatchBuilder
from divisi.cluster.engine.step.drafts import Drafts
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.request import Request, Sampling
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.batch import StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.stopwatch import Part, Stopwatch
from divisi.model.weights import load_weights

CUDA = torch.device("cuda", 0)
PAGE, PAGES, SLOTS, MOST_ROWS = 16, 4096, 80, 4
STEPS = {"1 row of 8": (8, 0, 5), "3 drafts of 8": (8, 3, 7), "1 row of 64": (64, 0, 49)}
"""Sequences, drafts of each, and how many of them are left in the last step, in the same bucket."""
WAITS = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "item")


@dataclass
class Record(TorchDispatchMode):
    """Everything that happens on the device, in order, with marks where a layer's part ends."""

    stub: stub_driver.StubDriver
    launches: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    inside: bool = False
    """Past the first mark, which is where layers begin, and before the last."""
    _taken: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self._note_faults(name, func, [*args, *(kwargs or {}).values()], tensors)
        if not _is_view(func) and name not in ("empty", "empty_strided", "new_empty", "detach"):
            self._take_triton()
            grid = [list(tensor.shape) for tensor in tensors]
            places = [list(stub_driver.place(tensor)) for tensor in tensors]
            self.launches.append({"name": f"torch.{name}", "grid": grid, "places": places})
        return out

    def _note_faults(self, name: str, func: Any, given: Sequence[Any], out: Sequence[Tensor]) -> None:
        if not self.inside:
            return
        if any(name.startswith(wait) for wait in WAITS):
            self.faults.append(f"{name} waits for the device")
        devices = {t.device.type for t in (*given, *out) if isinstance(t, Tensor)}
        if len(devices) > 1:
            self.faults.append(f"{name} copies between {' and '.join(sorted(devices))}")
        held = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        if any(t.untyped_storage()._cdata not in held for t in out):
            self.faults.append(f"{name} takes memory for {[list(t.shape) for t in out]}")

    def _take_triton(self) -> None:
        for launch in self.stub.launches[self._taken :]:
            places = [list(at) for at in launch.places]
            self.launches.append({"name": launch.name, "grid": list(launch.grid), "places": places})
        self._taken = len(self.stub.launches)

    def mark(self, name: str) -> None:
        self.inside = name != "end"
        self._take_triton()
        self.launches.append({"mark": name})


class WithoutCuda(TorchFunctionMode):
    """What torch without CUDA refuses to do with fake CUDA tensors in its bindings, by operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ == "__getitem__":
            return _indexed(args[0], args[1])
        if func.__name__ == "__setitem__":
            target, index, value = args
            if _by_tensor(index):
                return torch.ops.aten.index_put_(target, [torch.as_tensor(index, device=target.device)], value)
            return torch.ops.aten.copy_(_indexed(target, index), value)
        if func.__name__ == "tensor" and isinstance(args[0], list) and not args[0]:
            return torch.empty(0, **(kwargs or {}))
        if func.__name__ == "contiguous":
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func.__name__ == "copy_":
            return torch.ops.aten.copy_(*args)
        if func.__name__ == "numpy":  # of the host's tensors, which are none of fake ones
            with unset_fake_temporarily():
                return func(*args)
        return func(*args, **(kwargs or {}))


def _by_tensor(index: Any) -> bool:
    return isinstance(index, (Tensor, list))


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    if _by_tensor(index):
        return torch.ops.aten.index(tensor, [index])
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            assert part.step in (None, 1), "no such index in the model"
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop)
            dim += 1
    return tensor


class Marks(Stopwatch):
    """Marks the record instead of reading the clock."""

    def __init__(self, mark: Callable[[str], None]) -> None:
        super().__init__()
        self._mark = mark

    def lap(self, part: Part) -> None:
        self._mark(part)


class FakeCheckpoint(EmptyCheckpoint):
    """On the device."""

    device = CUDA


class RealHost(int_buffer.Mirrored):
    """The host's side has numbers, the device's has none."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        with unset_fake_temporarily():
            self.host = torch.zeros(size, dtype=dtype)
        self.device = torch.zeros(size, dtype=dtype, device=device)

    def sent(self, count: int) -> Tensor:
        return self.device


@contextmanager
def real_hosts() -> Iterator[None]:
    """Wherever integers are laid out."""
    with mock.patch.object(batch, "Mirrored", RealHost), mock.patch.object(int_buffer, "Mirrored", RealHost):
        yield


def decode_steps(sequences: int, drafts: int, later: int) -> Iterator[tuple[StepPlan, StepBatch]]:
    """Three of a scheduler, as its engine lays them out: other lengths, other drafts stand, some end."""
    limits = SchedulerConfig(
        vocab_size=1000, max_model_len=1024, num_pages=PAGES, page_size=PAGE, num_slots=SLOTS, max_seqs=64,
        max_step_tokens=16384, max_draft_tokens=drafts,
    )  # fmt: skip
    scheduler, builder = Scheduler(limits), BatchBuilder(limits, CUDA, padded=True)
    for index in range(sequences):
        prompt = tuple(range(160 - 37 * index % 61))
        scheduler.submit(Request(str(index), prompt, 100, Sampling(0.0), max_draft_tokens=drafts))
    step = 0
    while step < 3:
        plan = scheduler.plan()
        assert plan is not None
        builder.grow(plan.growths)
        if not plan.scans:
            yield plan, builder.build(plan, Drafts())
            step += 1
        accepted = [1 + (step + index) % (1 + run.num_drafts) for index, run in enumerate(plan.runs)]
        scheduler.commit(plan, [[7] * count for count in accepted])
        if step == 2:
            for index in range(later, sequences):
                scheduler.cancel(str(index))


def main() -> None:
    arch = int(sys.argv[1])
    stub = stub_driver.install(arch)
    config = ModelConfig.from_hf(PUBLISHED | {"num_hidden_layers": 4})
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    with FakeTensorMode(), torch.inference_mode(), WithoutCuda(), real_hosts():
        record = Record(stub)
        checkpoint = cast(Checkpoint, FakeCheckpoint())
        store = StateStore(
            config, num_pages=PAGES, page_size=PAGE, num_slots=SLOTS, max_rows=MOST_ROWS, dtype=torch.bfloat16,
            device=CUDA,
        )  # fmt: skip
        weights = load_weights(checkpoint, config, kernels, torch.bfloat16, CUDA)
        bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, torch.bfloat16, CUDA)
        runner = ModelRunner(config, weights, store, kernels, Marks(record.mark))
        told = {}
        for name, (sequences, drafts, later) in STEPS.items():
            steps = []
            for plan, laid_out in decode_steps(sequences, drafts, later):
                record.launches, record.faults, before = [], [], len(stub.kernels)
                with record:
                    runner.forward(laid_out, LocalEnd(bank))
                    record.mark("end")
                steps.append({
                    "launches": record.launches, "faults": record.faults, "compiled": len(stub.kernels) - before,
                    "sequences": len(plan.rings), "rows": plan.num_rows, "starts": [run.start for run in plan.rings],
                })  # fmt: skip
            told[name] = steps[1:]  # the first makes room
    json.dump(told, sys.stdout)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


if __name__ == "__main__":
    main()
