"""Experts that come and go: what is held and served, what is read for it, and that a row's bits stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.linear.layout import PackedMatrix, StoredMatrix, restacked
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.checkpoint.layout import ExpertLayout
from divisi.model.checkpoint.shares import rank_tensors
from divisi.model.config import ModelConfig
from divisi.model.demo import checkpoint_dir
from divisi.model.errors import CheckpointError
from divisi.model.experts import ExpertBank, LeavesNotHeld, ServedExperts
from divisi.model.placement import Layout, Role, share_of
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

CPU = torch.device("cpu")
LEAVES = 8
HISTORY = [{0, 1, 2}, {0, 1, 2, 3, 7}, {7}, {0, 3, 5, 7}, set(range(8)), {6, 2}]
"""One after another: more, fewer, others."""


@pytest.fixture(scope="module", params=["published", "packed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    layout: ExpertLayout = request.param
    path = tmp_path_factory.mktemp(layout)
    write_random_checkpoint(path, SMALL_CONFIG, layout=layout, mtp=True, tokenizer=False)
    opened = Checkpoint.open(path)
    yield opened
    opened.close()


def bank_of(
    checkpoint: Checkpoint, leaves: set[int], kernels: Kernels | None = None, dtype: torch.dtype = torch.bfloat16
) -> ExpertBank:
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    share = share_of(config.num_experts, LEAVES, leaves)
    return ExpertBank.load(checkpoint, config, share, kernels or select_kernels(CPU), dtype, CPU)


def rows_for(config: ModelConfig, rows: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    ids_TE = torch.rand(rows, config.num_experts, generator=rng).argsort(dim=1)
    ids_TK = ids_TE[:, : config.num_experts_per_tok].int().contiguous()
    return torch.randn(rows, config.hidden_size, generator=rng), ids_TK, torch.rand(ids_TK.shape, generator=rng)


def bytes_of(checkpoint: Checkpoint, config: ModelConfig, leaves: set[int]) -> int:
    """On disk, of the experts of these leaves."""
    experts = [e for e in range(config.num_experts) if e % LEAVES in leaves]
    return sum(rank_tensors(config, checkpoint.tensors, Role("expert:0", False, experts)).values())


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_is_what_a_fresh_process_would_hold(
    checkpoint: Checkpoint, kernels: str, dtype: torch.dtype
) -> None:
    """Whatever was held before: the same sums and bytes; and what is read is what lacked."""
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    chosen = select_kernels(CPU, kernels)
    bank, rows, held = bank_of(checkpoint, set(), chosen, dtype), rows_for(config), set[int]()
    for leaves in HISTORY:
        before = checkpoint.bytes_read
        bank.hold(checkpoint, config, leaves)
        assert checkpoint.bytes_read - before == bytes_of(checkpoint, config, leaves - held)
        fresh, held = bank_of(checkpoint, leaves, chosen, dtype), leaves
        assert bank.held == held
        assert bank.nbytes == fresh.nbytes
        for layer in (0, config.num_hidden_layers - 1, config.mtp_index):
            assert torch.equal(bank.partial_sum(layer, *rows), fresh.partial_sum(layer, *rows))


def test_what_is_served_has_the_same_bits_whatever_else_is_held(checkpoint: Checkpoint) -> None:
    """As a bank that holds nothing else gives them, in pieces as in whole subtrees."""
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    layout = Layout(LEAVES, ((2, 3), (), (0, 5, 6, 7), (1, 4)))
    rows, everything = rows_for(config), bank_of(checkpoint, set(range(LEAVES)))
    for seat in layout.seats:
        own = set(layout.served[seat])
        for bank in (everything, bank_of(checkpoint, own | {4})):
            served = bank.serving(layout, seat)
            y_TD = served.partial_sum(3, *rows)
            assert y_TD.shape[1] == config.hidden_size * len(layout.subtrees(seat))
            assert torch.equal(y_TD, bank_of(checkpoint, own).partial_sum(3, *rows))
            assert served.leaves == own


def test_steps_go_on_beside_what_comes_and_goes(checkpoint: Checkpoint) -> None:
    """Another thread's sums never change, and what it serves stays, whatever is to be held."""
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    bank, rows = bank_of(checkpoint, {0, 1, 2}), rows_for(config, rows=3)
    served = bank.serving(Layout(LEAVES, ((1, 2), (0, 3, 4, 5, 6, 7))), 0)
    layers = (*config.moe_layers, *config.draft_moe_layers)
    want = [served.partial_sum(layer, *rows) for layer in layers]
    done, wrong, steps = threading.Event(), [], [0]

    def serve(served: ServedExperts) -> None:
        while not done.is_set():
            got = [served.partial_sum(layer, *rows) for layer in layers]
            wrong.extend(layer for layer, y, z in zip(layers, got, want, strict=True) if not torch.equal(y, z))
            steps[0] += 1

    thread = threading.Thread(target=serve, args=(served,))
    thread.start()
    try:
        for leaves in HISTORY * 3:
            before = steps[0]
            bank.hold(checkpoint, config, leaves)
            assert bank.held == leaves | {1, 2}
            while steps[0] < before + 2 and thread.is_alive():
                done.wait(0.001)
    finally:
        done.set()
        thread.join(20)
    assert not wrong
    assert steps[0] >= 2 * len(HISTORY)
    del served
    bank.hold(checkpoint, config, {5})
    assert bank.held == {5}


def test_who_does_not_hold_it_does_not_serve_it(checkpoint: Checkpoint) -> None:
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    bank = bank_of(checkpoint, {0, 1, 2, 3})
    with pytest.raises(LeavesNotHeld, match=r"expert:1 is to serve virtual shards \[4, 5, 6, 7\] of 8 that it"):
        bank.serving(Layout.even(LEAVES, 2), 1)
    with pytest.raises(LeavesNotHeld, match=r"of 4 that it does not hold"):
        bank.serving(Layout.even(4, 2), 0)
    told: list[frozenset[int]] = []

    def progress(_: int) -> None:
        told.append(bank.held)
        with pytest.raises(LeavesNotHeld):  # half of the layers have it
            bank.serving(Layout(LEAVES, ((4,), (0, 1, 2, 3, 5, 6, 7))), 0)

    bank.hold(checkpoint, config, {0, 1, 4}, progress)
    assert set(told) == {frozenset({0, 1})}, "what is given up is gone at once, what is read comes last"
    assert bank.serving(Layout(LEAVES, ((4,), (0, 1, 2, 3, 5, 6, 7))), 0).leaves == {4}


def test_what_was_read_before_a_failure_is_not_read_again(checkpoint: Checkpoint) -> None:
    config = ModelConfig.load(checkpoint.model_dir).with_mtp(True)
    bank, rows = bank_of(checkpoint, {0, 1}), rows_for(config)

    class Torn(Exception):
        pass

    def tear(_: int) -> None:
        raise Torn

    before = checkpoint.bytes_read
    served: ServedExperts = bank.serving(Layout(LEAVES, ((0,), tuple(range(1, LEAVES)))), 0)
    want = served.partial_sum(0, *rows)
    with pytest.raises(Torn):
        bank.hold(checkpoint, config, {0, 3}, tear)
    assert bank.held == {0}
    assert torch.equal(served.partial_sum(0, *rows), want)
    bank.hold(checkpoint, config, {0, 3})
    assert checkpoint.bytes_read - before == bytes_of(checkpoint, config, {3})
    assert torch.equal(bank.partial_sum(0, *rows), bank_of(checkpoint, {0, 3}).partial_sum(0, *rows))


def test_a_damaged_file_is_named_and_what_is_held_stays(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL_CONFIG, tokenizer=False)
    config, whole = ModelConfig.load(tmp_path), Checkpoint.open(tmp_path)
    bank = bank_of(whole, {0})
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    damaged = Checkpoint(tmp_path, {name: info for name, info in whole.tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=lost):
        bank.hold(damaged, config, {0, 3})
    assert bank.held == {0}
    rows = rows_for(config)
    served = bank.serving(Layout(LEAVES, ((0,), tuple(range(1, LEAVES)))), 0)
    for layer in config.moe_layers:
        assert torch.equal(served.partial_sum(layer, *rows), bank_of(whole, {0}).partial_sum(layer, *rows))


def test_of_the_demo_checkpoint_a_third_shard_reads_its_share_alone() -> None:
    """From two shards to three and back, with the default number of virtual shards."""
    checkpoint, config = Checkpoint.open(checkpoint_dir()), ModelConfig.load(checkpoint_dir())
    two, three = (Layout.even(min(32, config.num_experts), shards) for shards in (2, 3))
    leaves = two.leaves

    def role(own: set[int]) -> Role:
        return Role("expert", False, [e for e in range(config.num_experts) if e % leaves in own])

    def bytes_on_disk(own: set[int]) -> int:
        return sum(rank_tensors(config, checkpoint.tensors, role(own)).values())

    share = share_of(config.num_experts, leaves, two.served[0])
    bank = ExpertBank.load(checkpoint, config, share, select_kernels(CPU), torch.bfloat16, CPU)
    assert checkpoint.bytes_read == bytes_on_disk(set(two.served[0]))
    for layout in (three, two):
        before, lacking = checkpoint.bytes_read, set(layout.served[0]) - bank.held
        bank.hold(checkpoint, config, layout.served[0])
        assert checkpoint.bytes_read - before == bytes_on_disk(lacking)
        assert bool(lacking) == (layout is two)
        assert bank.serving(layout, 0).leaves == set(layout.served[0])


@pytest.mark.parametrize("form", ["rows", "stored", "packed"])
def test_stacks_are_cut_and_joined_matrix_by_matrix(form: str) -> None:
    """In each of the forms in which weights lie."""
    values = torch.randn(6, 4, 3)

    def matrix(stack: Tensor) -> Tensor | StoredMatrix | PackedMatrix:
        if form == "rows":
            return stack
        return StoredMatrix(stack, scales=stack[:, 0]) if form == "stored" else PackedMatrix(stack.flatten(1), 4, 3)

    first, second = matrix(values[:4]), matrix(values[4:])
    joined = restacked([first, second], [(1, 1), (0, 3), (0, 0)])
    want = matrix(values[[5, 3, 0]])
    if isinstance(joined, Tensor):
        assert torch.equal(joined, values[[5, 3, 0]])
    elif isinstance(joined, StoredMatrix):
        assert isinstance(want, StoredMatrix)
        assert torch.equal(joined.values, want.values)
        assert joined.scales is not None
        assert want.scales is not None
        assert torch.equal(joined.scales, want.scales)
    else:
        assert isinstance(want, PackedMatrix)
        assert torch.equal(joined.data, want.data)
        assert (joined.outputs, joined.inputs) == (4, 3)
    assert joined.nbytes == want.nbytes
    assert restacked([first], [(0, at) for at in range(4)]).nbytes == first.nbytes
