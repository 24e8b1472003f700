"""A driver without a GPU: each launch is specialised and compiled for a chip as in production, then recorded, not run.

For a process without TRITON_INTERPRET.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
"""Bytes a block may have, by capability."""


class _Utils:
    def __init__(self, arch: int) -> None:
        self._arch = arch

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, _: object) -> dict[str, int]:
        shared = SHARED_MEMORY[self._arch]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


@dataclass(frozen=True)
class Launch:
    """What was launched, and the places of its tensors."""

    name: str
    grid: tuple[int, int, int]
    places: tuple[tuple[int, int], ...]


def place(tensor: torch.Tensor) -> tuple[int, int]:
    """Stands for a tensor's address, which one without memory has none of: its storage, and the byte it begins at."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.itemsize


@dataclass
class StubDriver(DriverBase):  # type: ignore[misc]  # Triton has no types here
    """Compiles for ``arch`` and keeps what was launched."""

    arch: int
    launches: list[Launch] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    """Compiled kernels by hash."""

    def __post_init__(self) -> None:
        self.utils = _Utils(self.arch)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("a kernel is tuned at run time")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            tensors = [argument for argument in rest if isinstance(argument, torch.Tensor)]
            self.launches.append(Launch(metadata.name, (x, y, z), tuple(map(place, tensors))))

        return launch


def install(arch: int) -> StubDriver:
    """Make the driver this process's, and keep every kernel that Triton compiles."""
    stub = StubDriver(arch)
    driver.set_active(stub)

    def keep(*, key: Any, repr: Any, fn: Any, compile: Any, is_manual_warmup: Any, already_compiled: Any) -> None:
        kernel = fn.jit_function.device_caches[0][0].get(key)
        if kernel is not None:
            stub.kernels[kernel.hash] = kernel

    triton.knobs.runtime.jit_post_compile_hook = keep
    return stub
