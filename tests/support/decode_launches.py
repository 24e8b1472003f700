"""`python -m tests.support.decode_launches ARCH`: the launches of decode steps at the published sizes; JSON.

Four layers of the 80 B model, three of them Gated DeltaNet, on fake CUDA tensors: the production host code runs whole,
every Triton launch is compiled and recorded by the stub driver, and every other operation on the device is counted as a
launch of its own. What would wait for the device, copy to the host or take memory within the layers is recorded too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import EmptyCheckpoint
from divisi.benchmarks.gpu.shapes import PUBLISHED
from divisi.cluster.dispatch.local import LocalEnd
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.batch import DecodeRows, StepBatch
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
        if func.__name__ == "contiguous":
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func.__name__ == "copy_":
            return torch.ops.aten.copy_(*args)
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


class Inputs:
    """A step's inputs, at the same addresses each time."""

    def __init__(self, rows: Sequence[int], pages: int) -> None:
        total, runs = sum(rows), len(rows)
        ints = torch.empty(4 * total + 4 * runs + 8, dtype=torch.int32, device=CUDA)
        sizes = (total, total, runs + 1, runs, runs)
        ends = list(accumulate((-(-size // 4) * 4 for size in sizes), initial=0))
        positions, kv_rows, starts, lengths, slots = (
            ints[start : start + size] for start, size in zip(ends, sizes, strict=False)
        )
        tables = torch.empty((runs, pages), dtype=torch.int32, device=CUDA)
        self.batch = StepBatch(
            token_ids_T=torch.empty(total, dtype=torch.int64, device=CUDA), positions_T=positions, kv_rows_T=kv_rows,
            decode=DecodeRows(starts, lengths, slots, tables), prefill=None, decode_rows=total,
            logit_rows_R=torch.empty(total, dtype=torch.int64, device=CUDA),
        )  # fmt: skip


def main() -> None:
    arch = int(sys.argv[1])
    stub = stub_driver.install(arch)
    config = ModelConfig.from_hf(PUBLISHED | {"num_hidden_layers": 4})
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    with FakeTensorMode(), torch.inference_mode(), WithoutCuda():
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
        for name, rows in {"1 row of 8": [1] * 8, "3 drafts of 8": [4] * 8, "1 row of 64": [1] * 64}.items():
            inputs, steps = Inputs(rows, pages=64), []
            for _ in range(3):  # the first makes room
                record.launches, record.faults, before = [], [], len(stub.kernels)
                with record:
                    runner.forward(inputs.batch, LocalEnd(bank))
                    record.mark("end")
                steps.append({
                    "launches": record.launches, "faults": record.faults, "compiled": len(stub.kernels) - before
                })  # fmt: skip
            told[name] = steps[1:]
    json.dump(told, sys.stdout)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


if __name__ == "__main__":
    main()
