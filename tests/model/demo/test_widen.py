"""Twice the heads: the same outputs, new heads that are no mere copies, and a checkpoint that tells its heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from divisi.model.config import ModelConfig
from divisi.model.demo.export import CONFIG, NARROW, read_network, write_checkpoint
from divisi.model.demo.network import Network
from divisi.model.demo.tokenizer import train_tokenizer, write_tokenizer
from divisi.model.demo.widen import widen


@pytest.fixture(scope="module")
def narrow() -> Network:
    torch.manual_seed(3)
    network = Network(ModelConfig.from_hf(CONFIG | NARROW))
    for parameter in network.parameters():  # no output projection that is all zeros
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return network


@pytest.fixture(scope="module")
def wide(narrow: Network) -> Network:
    return widen(narrow, seed=1)


def test_it_says_the_same(narrow: Network, wide: Network) -> None:
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 300), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = (
            [hidden := network.hidden(ids, context), *network.drafts(ids, hidden, context, 2)]
            for network in (narrow, wide)
            for context in [network.context(torch.ones(ids.shape))]
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_new_heads_learn_something_else(wide: Network) -> None:
    """A copy in all would get the gradients of what it copies, for ever."""
    attention = wide.mtp.layers[0].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        old, new = weight.detach().chunk(2)
        likeness = float(torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0))
        assert 0.8 < likeness < 0.95


def test_the_checkpoint_has_as_many_heads_as_its_weights(narrow: Network, wide: Network, tmp_path: Path) -> None:
    write_tokenizer(train_tokenizer(["some words for merges"], 300), "", 1024, tmp_path)
    for network in (narrow, wide):
        write_checkpoint(network.state_dict(), tmp_path)
        assert read_network(tmp_path).config.num_attention_heads == network.config.num_attention_heads
        assert read_network(tmp_path).config.num_key_value_heads == network.config.num_key_value_heads
    assert wide.config.num_attention_heads == CONFIG["num_attention_heads"]
