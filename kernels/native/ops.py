"""The C++ kernels under the signatures of the references. CPU tensors; fp32 activations; fp32 or bf16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from divisi.kernels.native.attention import Attention
from divisi.kernels.native.delta import GatedDelta
from divisi.kernels.native.dense import Dense
from divisi.kernels.native.experts import Experts
from divisi.kernels.native.fused import Fused
from divisi.kernels.native.loader import Library
from divisi.kernels.native.sampling import Sampling


def native_operations(library: Library, deterministic: bool = False) -> Mapping[str, Any]:
    """By name. They call the library with as many threads as torch has in the calling thread at that time.

    Packed weights, which bf16 weights are where the processor has dot products of them, have one kernel for any number
    of rows. With others torch takes over where it is faster: products of many rows, and the attention of prefilling
    rows. Its results depend on how many rows it is given. With ``deterministic`` it never does, and a row's result
    depends neither on the rows beside it nor on how the prompt is cut, nor on whether the row is decoded or scanned.
    """
    dense, attention = Dense(library, deterministic), Attention(library, deterministic)
    parts = (dense, Experts(library, dense), GatedDelta(library), attention, Sampling(library))
    table = {name: getattr(part, name) for part in parts for name in dir(part) if not name.startswith("_")}
    return table | {"fused": Fused(library, deterministic)}
