"""The memory of passes: the same addresses for each of one size, and nothing that is still read is given out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from divisi.kernels.pass_memory import Buffers, PassKind

CPU = torch.device("cpu")
LARGE = (1 << 19,)


def one_pass(memory: Buffers, kind: PassKind = "full", *, decoding: bool = True, layers: int = 3) -> Sequence[Tensor]:
    """A pass whose layers leave something to the next one."""
    memory.begin(kind, CPU, decoding=decoding)
    found = [memory.empty((4,), torch.int32, CPU)]
    for index in range(layers):
        memory.layer(index)
        found += [memory.empty(LARGE, torch.float32, CPU), memory.empty((3, index + 1), torch.bfloat16, CPU)]
    memory.after_layers()
    found.append(memory.empty((5,), torch.float32, CPU))
    return found


def test_addresses_are_the_same_once_there_is_room() -> None:
    memory = Buffers()
    one_pass(memory)
    first, second = (one_pass(memory) for _ in range(2))
    assert [x.data_ptr() for x in first] == [x.data_ptr() for x in second]
    assert [x.dtype for x in first[:3]] == [torch.int32, torch.float32, torch.bfloat16]
    assert all(x.data_ptr() % 256 == first[0].data_ptr() % 256 for x in (first[0], first[-1]))


def test_a_layer_finds_what_the_one_before_it_left_and_the_pass_what_it_had() -> None:
    memory = Buffers()
    one_pass(memory)
    own, *of_layers, last = one_pass(memory)
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (own, *of_layers[:4], last)]
    assert all(a is b or a[1] <= b[0] or b[1] <= a[0] for a in spans for b in spans)
    assert of_layers[4].data_ptr() == of_layers[0].data_ptr(), "the third layer takes the first one's place"


def test_draft_passes_take_turns() -> None:
    memory = Buffers()
    for _ in range(2):
        parts = [one_pass(memory, kind, layers=0)[0] for kind in ("even draft", "odd draft", "full")]
    assert len({x.data_ptr() for x in parts}) == 3


def test_prefills_and_what_is_asked_for_outside_of_passes_get_memory_of_their_own() -> None:
    memory = Buffers()
    outside = memory.empty((2,), torch.float32, CPU)
    one_pass(memory)
    held = one_pass(memory)
    prefill = one_pass(memory, decoding=False)
    assert {x.untyped_storage().data_ptr() for x in (outside, *prefill)}.isdisjoint(
        x.untyped_storage().data_ptr() for x in held
    )
