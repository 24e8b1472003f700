"""The curriculum: what each stage trains on and for how long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from divisi.model.config import ModelConfig
from divisi.model.config.tensor_names import SINGLE_FILE
from divisi.model.demo.corpus.conversation import render
from divisi.model.demo.corpus.mixture import Mix, make_conversation
from divisi.model.demo.corpus.words import Words
from divisi.model.demo.export import CONFIG, NARROW, read_network
from divisi.model.demo.network import Network
from divisi.model.demo.network.induction import plant_induction
from divisi.model.demo.tokenizer import train_tokenizer, write_tokenizer
from divisi.model.demo.train import TASTE, Job, Stage, train
from divisi.model.text.template import ChatTemplate

_CONVERSATIONS = 12_000
"""That the tokenizer is learnt from: 8 million characters."""

_SHARP = dataclasses.replace(TASTE, others=0.01, mix=Mix(tools=0.6, recall=0.27))
"""Once it copies, what others say is noise to learn from."""

_FACTS = dataclasses.replace(_SHARP, mix=Mix(tools=0.5, recall=0.42, dense=0.6))

_ALL_WIDTHS = {
    128: 0.05,
    192: 0.10,
    256: 0.16,
    384: 0.24,
    512: 0.2,
    768: 0.12,
    1024: 0.06,
    2304: 0.05,
    4352: 0.03,
    8448: 0.015,
}

_WIDE = Stage(
    steps=1300,
    widths=_ALL_WIDTHS | {2304: 0.06, 4352: 0.03, 8448: 0.015},
    warmup=60,
    decay_from=300,
    batches=4,
    muon_rate=0.010,
    adam_rate=1.5e-3,
    taste=dataclasses.replace(_SHARP, crowded=0.4, mix=Mix(tools=0.58, recall=0.36, dense=0.3, running=0.5, busy=0.55)),
)

STAGES: dict[str, Stage] = {
    "begin": Stage(
        steps=600,
        widths={64: 0.15, 96: 0.15, 128: 0.25, 192: 0.25, 256: 0.2},
        warmup=20,
        decay_from=600,
    ),
    "main": Stage(
        steps=3700,
        widths={96: 0.04, 128: 0.06, 192: 0.12, 256: 0.16, 384: 0.22, 512: 0.20, 768: 0.12, 1024: 0.06, 2304: 0.02},
        warmup=20,
        decay_from=2000,
        last=0.71,
    ),
    "sharp": Stage(
        steps=3900,
        widths={96: 0.02, 128: 0.06, 192: 0.12, 256: 0.16, 384: 0.22, 512: 0.18, 768: 0.12, 1024: 0.09, 2304: 0.03},
        warmup=20,
        decay_from=20,
        last=0.38,
        muon_rate=0.014,
        adam_rate=2.1e-3,
        taste=_SHARP,
    ),
    "long": Stage(
        steps=1200,
        widths={
            128: 0.05,
            192: 0.10,
            256: 0.15,
            384: 0.22,
            512: 0.20,
            768: 0.12,
            1024: 0.10,
            2304: 0.08,
            4352: 0.04,
            8448: 0.012,
        },
        warmup=10,
        decay_from=10,
        last=0.48,
        muon_rate=0.005,
        adam_rate=7.5e-4,
        taste=dataclasses.replace(_SHARP, mix=Mix(tools=0.55, recall=0.35)),
    ),
    "facts": Stage(
        steps=1850,
        widths={128: 0.05, 192: 0.10, 256: 0.16, 384: 0.26, 512: 0.2, 768: 0.13, 1024: 0.06, 2304: 0.03, 4352: 0.01},
        warmup=10,
        decay_from=10,
        muon_rate=0.009,
        adam_rate=1.35e-3,
        taste=_FACTS,
    ),
    "last": Stage(
        steps=900,
        widths={128: 0.05, 192: 0.10, 256: 0.16, 384: 0.26, 512: 0.2, 768: 0.14, 1024: 0.07, 2304: 0.02},
        warmup=10,
        decay_from=10,
        muon_rate=0.008,
        adam_rate=1.2e-3,
        taste=dataclasses.replace(_FACTS, mix=Mix(tools=0.4, recall=0.55, dense=0.5)),
    ),
    "calls": Stage(
        steps=600,
        widths=_ALL_WIDTHS,
        warmup=20,
        decay_from=200,
        last=0.73,
        batches=4,
        muon_rate=0.010,
        adam_rate=1.5e-3,
        taste=dataclasses.replace(_SHARP, mix=Mix(tools=0.68, recall=0.26, dense=0.5, busy=0.6)),
    ),
    "even": Stage(
        steps=1200,
        widths=_ALL_WIDTHS | {2304: 0.07, 4352: 0.04, 8448: 0.02},
        warmup=20,
        decay_from=20,
        batches=4,
        muon_rate=0.007,
        adam_rate=1.05e-3,
        taste=dataclasses.replace(_SHARP, mix=Mix(tools=0.52, recall=0.40, dense=0.3, running=0.55, busy=0.5)),
    ),
    "wide": _WIDE,
    "names": dataclasses.replace(
        _WIDE,
        steps=440,
        warmup=20,
        decay_from=20,
        muon_rate=0.007,
        adam_rate=1.05e-3,
        taste=dataclasses.replace(_WIDE.taste, mix=Mix(tools=0.62, recall=0.32, dense=0.3, running=0.5, busy=0.75)),
    ),
    "drafts": Stage(
        steps=1500,
        widths={128: 0.1, 256: 0.3, 384: 0.3, 512: 0.3},
        warmup=20,
        decay_from=60,
        mtp_depth=3,
        drafts_only=True,
        taste=dataclasses.replace(TASTE, others=0.5),
    ),
    "ahead": Stage(
        steps=700,
        widths={128: 0.1, 256: 0.15, 512: 0.2, 1024: 0.55},
        warmup=20,
        decay_from=100,
        mtp_depth=3,
        drafts_only=True,
        taste=dataclasses.replace(TASTE, others=0.05, mix=Mix(tools=0.4, recall=0.45)),
    ),
}
"""In the order in which they are run."""


def make_tokenizer(out: Path, seed: int) -> None:
    """Write tokenizer and template to a checkpoint folder."""
    source = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    template, words = ChatTemplate(source), Words(Random(seed), "train", familiar=0.4)
    texts = (
        render(template, make_conversation(words, words.random.choice((100, 256, 512))), words.random.random() < 0.15)
        for _ in tqdm(range(_CONVERSATIONS), unit="conversation")
    )
    tokenizer = train_tokenizer(texts, CONFIG["vocab_size"])
    write_tokenizer(tokenizer, source, CONFIG["max_position_embeddings"], out)


def run_stage(name: str, out: Path, seed: int, workers: int, steps: int | None = None) -> None:
    """Train one stage on what is in the folder, and write bf16 weights there, now and then and at the end."""
    stage = STAGES[name]
    if steps is not None:
        stage = dataclasses.replace(stage, steps=steps, decay_from=stage.decay_from * steps // stage.steps)
    train(read_network(out) if (out / SINGLE_FILE).exists() else begin(seed), Job(stage, seed, out, workers))


def begin(seed: int) -> Network:
    """A network that has seen nothing, with the induction heads it begins with."""
    torch.manual_seed(seed)
    network = Network(ModelConfig.from_hf(CONFIG | NARROW))
    plant_induction(network)
    return network
