"""How `--kernels` says which implementation does which operation. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from divisi.kernels.gpu.ahead import is_built
from divisi.kernels.native.build import can_build
from divisi.kernels.native.variants import VARIANTS, find_variant

IMPLEMENTATIONS = ("auto", "reference", "native", *VARIANTS, "triton")
CPU_IMPLEMENTATIONS = frozenset({"native", *VARIANTS})
"""Those in C++."""
OPERATIONS = (
    "linear", "mlp", "rms_norm", "add_rms_norm", "silu_mul", "route", "routed_experts", "add_shared",
    "gated_delta_decode", "gated_delta_prefill", "gated_delta_flush", "attention_inputs", "attention_decode",
    "attention_prefill", "choose_tokens",
)  # fmt: skip

MIXTURE = "mixture"
"""Several of these at once, where an implementation has that: `mixture=reference` does one after another."""


def checked_choice(text: str) -> str:
    """The text, which KernelChoice understands. Raises ValueError."""
    KernelChoice.parse(text)
    return text


def kernels_here(choice: str, device: str) -> str:
    """What a choice comes to on a device (`cpu` or `cuda`) of this machine, to be read; nothing is built."""
    told = KernelChoice.parse(choice)
    others = [f"{operation} by {_here(name, device)}" for operation, name in told.exceptions.items()]
    return ", ".join([_here(told.general, device), *others])


def packs_here(choice: str) -> bool:
    """Whether bf16 weights are packed by what a choice comes to on the CPU of this machine."""
    name = KernelChoice.parse(choice).general
    if name == "reference":
        return False
    variant = find_variant(name if name in VARIANTS else None)
    return variant.bf16 and can_build(variant)


def _here(name: str, device: str) -> str:
    if name == "reference":
        return "the references"
    if device != "cpu":
        return "Triton, compiled ahead (no GPU has run it so)" if is_built() else "Triton"
    variant = find_variant(name if name in VARIANTS else None)
    if not can_build(variant):
        return "the references, since there is no g++"
    return f"C++ {variant.name}"


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """One implementation for all operations, and others for some."""

    general: str
    exceptions: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``triton``, ``auto,route=reference`` or the like. Raises ValueError for unknown names."""
        general, exceptions = "auto", {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            operation, equals, name = part.rpartition("=")
            if name not in IMPLEMENTATIONS:
                variants = ", ".join(map(repr, VARIANTS))
                raise ValueError(
                    f"kernels {name!r} are unknown; use 'auto', 'reference', 'native' (one of {variants}) or 'triton'"
                )
            if not equals:
                general = name
            elif operation in (*OPERATIONS, MIXTURE):
                exceptions[operation] = name
            else:
                known = ", ".join((*OPERATIONS, MIXTURE))
                raise ValueError(f"kernels {part!r}: operation {operation!r} is unknown; use one of {known}")
        return cls(general, exceptions)

    @property
    def implementations(self) -> set[str]:
        """All that are named."""
        return {self.general, *self.exceptions.values()}
