"""Triton's cache, behind the kernels that this installation brings along.

A kernel is found by a digest of its source, its arguments' types, the chip, and Triton itself, so that what was
compiled of other sources is never taken for it: it is compiled as if nothing were there.
"""

from __future__ import annotations

import triton
from triton.runtime.cache import FileCacheManager

from divisi.kernels.gpu.ahead import BUILT_AHEAD, is_built


class CacheBehindBuilt(FileCacheManager):  # type: ignore[misc]  # Triton has no types here
    """Reads from BUILT_AHEAD first, which nobody may be able to write to; writes where Triton always does."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The paths of a kernel's files by name."""
        folder = BUILT_AHEAD / self.key
        if (folder / f"__grp__{filename}").exists():
            return {path.name: str(path) for path in folder.iterdir() if not path.name.startswith("__grp__")}
        own: dict[str, str] | None = super().get_group(filename)
        return own


def use_built() -> None:
    """Have Triton look there in this process, unless somebody chose a cache of his own."""
    if is_built() and triton.knobs.cache.manager_class is None:
        triton.knobs.cache.manager_class = CacheBehindBuilt
