"""Asking the system to hold large memory well."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from torch import Tensor

_LARGE = 4 << 20
_MADV_HUGEPAGE = 14
_LIBC = ctypes.CDLL(None)


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory is asked for in pages of 2 MiB; before anything is written to it.

    Whoever streams weights looks up an address a page, 512 times as often in small ones. A hint: where there are no
    huge pages (not Linux, not enough free memory) nothing changes.
    """
    if tensor.device.type != "cpu":
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    madvise: Any = getattr(_LIBC, "madvise", None)
    if length >= _LARGE and madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def return_freed_memory() -> None:
    """Give back what the C library keeps of freed memory: weights as they were before they were packed."""
    trim: Any = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
