"""A pass whose rows go through the layers in two micro-batches gives the bits of one, and leaves the same memory."""

from __future__ import annotations

import random
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.select import select_kernels
from divisi.model.layers.turns import in_turns
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.model_steps import CPU, LayerByLayer, ModelSteps

CONFIG = SMALL_CONFIG | {
    "vocab_size": 211,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "mlp_only_layers": [1],
}
SEQUENCES = 9


class InOrder(LayerByLayer):
    """Notes which layers are asked for."""

    def __init__(self, model: ModelSteps) -> None:
        super().__init__(model.dispatcher._experts)
        self.layers: list[tuple[int, int]] = []

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor):  # type: ignore[no-untyped-def]
        self.layers.append((layer, len(x_TD)))
        return super().dispatch(layer, x_TD, expert_ids_TK, gates_TK)


def walk(path: Path, dtype: torch.dtype, cuts: list[int]) -> tuple[list[Tensor], list[Tensor], InOrder]:
    """Prompts, then steps of one row and more of each sequence, the last of which are rejected; logits and memory."""
    kernels = select_kernels(CPU, "native")
    model = ModelSteps.load(path, kernels, dtype, sequences=SEQUENCES, most_tokens=64, max_rows=4)
    model.dispatcher = order = InOrder(model)
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(211) for _ in range(count)]

    found = [*model.step({}, {index: tokens(3 + index) for index in range(SEQUENCES)}).values()]
    for cut in cuts:
        rows = [rng.randint(1, 4) for _ in range(SEQUENCES)]
        rejected = {index: rng.randrange(rows[index]) for index in range(SEQUENCES)}
        found += model.step({i: tokens(rows[i]) for i in range(SEQUENCES)}, {}, rejected=rejected, cut=cut).values()
    store = model.runner.store
    memory = [tensor for pool in store.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
    return found, [store.hidden_SND, *memory, *(t for state in store.delta.values() for t in state.tensors)], order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_wherever_it_is_cut(tmp_path: Path, dtype: torch.dtype) -> None:
    write_random_checkpoint(tmp_path, CONFIG, seed=5, tokenizer=False, mtp=True)
    cuts = [1, 4, 5, SEQUENCES - 1]
    for got, want in zip(walk(tmp_path, dtype, cuts)[:2], walk(tmp_path, dtype, [0] * len(cuts))[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_experts_are_asked_half_by_half(tmp_path: Path) -> None:
    """So that the first half's are under way while the second half is with its mixer."""
    write_random_checkpoint(tmp_path, CONFIG, seed=5, tokenizer=False, mtp=True)
    *_, order = walk(tmp_path, torch.float32, [4])
    cut = order.layers[-6:]
    assert [layer for layer, _ in cut] == [0, 0, 2, 2, 3, 3]
    assert len({rows for _, rows in cut[::2]}) == len({rows for _, rows in cut[1::2]}) == 1


def test_walks_take_turns_and_return_in_order() -> None:
    said: list[str] = []

    def walk(name: str) -> Generator[None, None, str]:
        for stop in range(2):
            said.append(f"{name}{stop}")
            yield
        return name

    assert in_turns([walk("a"), walk("b")]) == ["a", "b"]
    assert said == ["a0", "b0", "a1", "b1"]
