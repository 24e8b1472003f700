"""Large memory in pages of 2 MiB: who streams weights looks up an address a page, 512 times as often in small ones."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

_LARGE = 4 << 20
_MADV_HUGEPAGE = 14


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory the kernel is asked to have in huge pages; before anything is written to it.

    A hint: where there are none (not Linux, not enough free memory) nothing changes.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    if tensor.device.type == "cpu" and length >= _LARGE and (madvise := _madvise()) is not None:
        madvise(start, length, _MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
