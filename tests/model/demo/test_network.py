"""The trainable network computes what the architecture's own implementation computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from divisi.model.config import ModelConfig
from divisi.model.demo.export import CONFIG, average_weights, packed, published, read_network, write_checkpoint
from divisi.model.demo.network import Network, Pass
from divisi.model.demo.network.attention import attend
from divisi.model.demo.network.delta import delta_rule
from divisi.model.demo.tokenizer import train_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_tokenizer(train_tokenizer(["some words for merges"], 300), "", 1024, out)
    torch.manual_seed(3)
    network = Network(ModelConfig.from_hf(CONFIG))
    for parameter in network.parameters():  # norms and biases too
        parameter.data += 0.05 * torch.randn(parameter.shape)
    write_checkpoint(network.state_dict(), out)
    return out


def everything(ids_BT: torch.Tensor, network: Network) -> Pass:
    return network.context(torch.ones(ids_BT.shape))


def test_logits_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = read_network(folder)
    ids_BT = torch.randint(0, CONFIG["vocab_size"], (2, 77), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(ids_BT).logits
        found = ours.head(ours.hidden(ids_BT, everything(ids_BT, ours)))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_padding_changes_nothing_before_it_and_no_router_counts_it(folder: Path) -> None:
    network = read_network(folder)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 41), generator=torch.Generator().manual_seed(7))
    padded, real = torch.nn.functional.pad(ids, (0, 9)), torch.nn.functional.pad(torch.ones(1, 41), (0, 9))
    with torch.no_grad():
        with_padding, alone = network.context(real), everything(ids, network)
        found = network.hidden(padded, with_padding)[:, :41]
        torch.testing.assert_close(found, network.hidden(ids, alone), atol=1e-4, rtol=1e-4)
    for share, expected in zip(with_padding.load.share_LE, alone.load.share_LE, strict=True):
        torch.testing.assert_close(share, expected)


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_attention_in_blocks_is_causal_attention(tokens: int) -> None:
    generator = torch.Generator().manual_seed(17)
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_the_chunked_delta_rule_is_the_recurrent_one() -> None:
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    batch, heads, tokens, keys, values = 2, 3, 75, 8, 5
    q, k, v = draw(batch, heads, tokens, keys), draw(batch, heads, tokens, keys), draw(batch, heads, tokens, values)
    k = k / k.norm(dim=-1, keepdim=True)
    beta, log_decay = draw(batch, heads, tokens).sigmoid(), -draw(batch, heads, tokens).abs()
    state = torch.zeros(batch, heads, keys, values)
    expected = []
    for t in range(tokens):
        state = state * log_decay[:, :, t, None, None].exp()
        delta = beta[:, :, t, None] * (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * delta[:, :, None, :]
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    torch.testing.assert_close(delta_rule(q, k, v, beta, log_decay), torch.stack(expected, 2), atol=1e-4, rtol=1e-4)


def test_the_average_of_checkpoints_has_the_mtp_layer_of_the_last(folder: Path, tmp_path: Path) -> None:
    parameters = read_network(folder).state_dict()
    other, out = tmp_path / "other", tmp_path / "out"
    for made in (other, out):
        write_tokenizer(train_tokenizer(["some words for merges"], 300), "", 1024, made)
    write_checkpoint({name: value + 1.0 for name, value in parameters.items()}, other)
    average_weights([other, folder], out)
    for name, value in read_network(out).state_dict().items():
        expected = parameters[name] + (0.0 if name.startswith("mtp.") else 0.5)
        torch.testing.assert_close(value, expected, atol=2e-2, rtol=1e-2)


def test_packing_experts_loses_nothing(folder: Path) -> None:
    parameters = read_network(folder).state_dict()
    again = packed(published(parameters, CONFIG["num_experts"], CONFIG["moe_intermediate_size"]), CONFIG["num_experts"])
    assert again.keys() == parameters.keys()
    assert all(torch.equal(again[name], parameters[name]) for name in parameters)


def test_a_second_pass_of_the_mtp_layer_sees_the_first_as_the_runtime_does(folder: Path) -> None:
    """Entry i of pass 2 depends on nothing after token i + 2, and on no other draft's second pass."""
    network = read_network(folder)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(13))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % CONFIG["vocab_size"]
    with torch.no_grad():
        context = everything(ids, network)
        hidden = network.hidden(ids, context)
        before = network.drafts(ids, hidden, context, 2)[1]
        after = network.drafts(changed, hidden, context, 2)[1]
    torch.testing.assert_close(before[:, :18], after[:, :18])
    assert not torch.allclose(before[:, 18], after[:, 18])
