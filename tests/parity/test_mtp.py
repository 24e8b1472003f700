"""The MTP layer against transformers' parts: logits of drafts, and committed entries, however a text is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from divisi.kernels.select import select_kernels
from divisi.model.demo import checkpoint_dir
from divisi.model.demo.batches import Batches, Taste, Writer
from divisi.model.demo.export import read_network
from divisi.model.demo.network import Network
from divisi.model.random_checkpoint import write_random_checkpoint
from tests.parity.mtp_oracle import MtpOracle
from tests.parity.variants import PUBLISHED_CONFIG
from tests.support.model_steps import CPU, PAGE, ModelSteps

TOLERANCE = 1e-3
DEPTH = 4
LENGTH = 61
# name -> what differs from the published spelling, and how the MTP layer's experts are stored
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "per expert": ({}, {}),
    "packed beside per expert": ({}, {"mtp_layout": "packed"}),
    "per expert beside packed": ({}, {"layout": "packed", "mtp_layout": "published"}),
    "tied, interval 2": ({"tie_word_embeddings": True, "full_attention_interval": 2}, {}),
    "unnormalised, biased": ({"norm_topk_prob": False, "attention_bias": True, "num_key_value_heads": 1}, {}),
}
# rows of each step until the text is through; negative: a ring run, of which the rows past the first are rejected
CUTS = {
    "one scan": [LENGTH],
    "row by row": [1] * LENGTH,
    "odd chunks": [1, 7, 8, 20, 25],
    "scans, then ring runs with rejected rows": [30, 1, -6, -1, -3, -2, *[-6] * 26],
}


QUICK = ("per expert", "packed beside per expert")


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.verify) for name in VARIANTS],
)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MtpOracle]:
    path = tmp_path_factory.mktemp("mtp")
    changes, layouts = VARIANTS[request.param]
    write_random_checkpoint(path, PUBLISHED_CONFIG | changes, seed=2, tokenizer=False, mtp=True, **layouts)
    return path, MtpOracle(path)


@pytest.mark.parametrize("cut", list(CUTS))
def test_drafts_and_entries(variant: tuple[Path, MtpOracle], cut: str) -> None:
    path, oracle = variant
    rng = random.Random(cut)
    text = [rng.randrange(211) for _ in range(LENGTH + DEPTH)]
    implementation = "native" if cut.startswith("scans") else "reference"
    kernels = select_kernels(CPU, implementation)
    model = ModelSteps.load(path, kernels, torch.float32, sequences=2, most_tokens=80, max_rows=6)
    take(model, text, CUTS[cut])
    hidden = None
    for ahead, expected in enumerate(oracle.draft_ahead(text[: LENGTH + 1], text[LENGTH + 1 :])):
        drafted = model.draft({1: text[LENGTH + ahead]}, ahead, hidden)
        hidden = drafted.hidden_SD
        torch.testing.assert_close(drafted.logits_SV[0], expected, atol=TOLERANCE, rtol=0)
    _, _, entries = oracle.drafts(text[:LENGTH], oracle.hidden(text[: LENGTH - 1]))
    store, pages = model.runner.store, model.held[1].pages
    pool = store.kv[max(store.kv)]
    rows = torch.tensor([pages[at // PAGE] * PAGE + at % PAGE for at in range(1, LENGTH)])
    torch.testing.assert_close(pool.key_PJD[rows], entries.keys, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(pool.value_PJD[rows], entries.values, atol=TOLERANCE, rtol=0)


def take(model: ModelSteps, text: list[int], cuts: list[int]) -> None:
    """Have sequence 1 hold the text's first LENGTH tokens; another one takes steps beside it."""
    at = 0
    for count in cuts:
        beside = {0: text[:2]} if at == 0 else {}
        if count > 0:
            model.step({}, beside | {1: text[at : at + count]})
            at += count
        elif at < LENGTH:
            model.step({1: [text[at], *[3] * (-count - 1)]}, beside, rejected={1: -count - 1})
            at += 1
    assert at == LENGTH


@pytest.mark.timeout(1800)
def test_the_demo_model_drafts_as_it_was_trained_to(
    full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    """Teacher-forced, drafts 1 to 3 of held-out conversations equal those of the network that was trained."""
    count, longest = (200, 400) if full_tier else (8, 80)
    network, folder = read_network(checkpoint_dir()), checkpoint_dir()
    batches = Batches(Writer(folder), "mtp parity", Taste("held_out"))
    texts: list[list[int]] = []
    while len(texts) < count:
        batch = batches.take(512, 2048)
        for ids, real in zip(batch.ids, batch.real, strict=True):
            texts.append(ids[: int(real.sum())][: longest + 3].tolist())
    texts = texts[:count]
    expected = [trained_drafts(network, text) for text in texts]
    model = ModelSteps.load(
        folder, select_kernels(CPU), torch.float32, sequences=count, most_tokens=longest + PAGE, max_rows=4
    )
    right = total = 0
    for at in range(1, longest):
        alive = [index for index, text in enumerate(texts) if at + 3 <= len(text)]
        tokens = {index: [texts[index][at - 1]] for index in alive}
        model.step(tokens if at > 1 else {}, tokens if at == 1 else {})
        hidden = None
        for ahead in range(3):
            drafted = model.draft({index: texts[index][at + ahead] for index in alive}, ahead, hidden)
            hidden, found = drafted.hidden_SD, drafted.logits_SV.argmax(-1).tolist()
            right += sum(expected[i][ahead][at - 1] == token for i, token in zip(alive, found, strict=True))
            total += len(alive)
    record_result("drafts equal", f"{right} of {total}")
    assert total > 1000
    assert right >= 0.995 * total


@torch.no_grad()
def trained_drafts(network: Network, text: list[int]) -> list[list[int]]:
    """Drafts 1 to 3 by position: entry i comes from the h of position i."""
    ids = torch.tensor([text])
    context = network.context(torch.ones(ids.shape))
    outs = network.drafts(ids, network.hidden(ids, context), context, 3)
    return [network.head(out).argmax(-1)[0].tolist() for out in outs]
