"""The curriculum: what each stage trains on and for how long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from divisi.model.checkpoint.index import SINGLE_FILE
from divisi.model.config import ModelConfig
from divisi.model.demo.batches import Shape
from divisi.model.demo.corpus.conversation import render
from divisi.model.demo.corpus.mixture import make_conversation
from divisi.model.demo.corpus.words import Words
from divisi.model.demo.export import CONFIG, read_network
from divisi.model.demo.network import Network
from divisi.model.demo.network.induction import plant_induction
from divisi.model.demo.tokenizer import train_tokenizer, write_tokenizer
from divisi.model.demo.train import Job, Stage, train
from divisi.model.text.template import ChatTemplate

_CONVERSATIONS = 12_000
"""That the tokenizer is learnt from: 8 million characters."""

_SHORT, _BRIEF, _MIDDLE, _LONG, _LONGER, _FAR = (
    Shape(64, 256, 4),
    Shape(100, 256, 4),
    Shape(128, 256, 4),
    Shape(256, 512, 2),
    Shape(512, 1024, 1),
    Shape(1024, 1024, 1),
)
_FARTHER = Shape(2048, 2304, 1)

STAGES: dict[str, Stage] = {
    "main": Stage(
        steps=2000,
        shapes=(
            (0.05, _SHORT),
            (0.15, _BRIEF),
            (0.15, _MIDDLE),
            (0.30, _LONG),
            (0.25, _LONGER),
            (0.07, _FAR),
            (0.03, _FARTHER),
        ),
        warmup=10,
        decay_from=2000,
        mtp_depth=1,
    ),
    "long": Stage(
        steps=2400,
        shapes=(
            (0.10, _BRIEF),
            (0.14, _MIDDLE),
            (0.30, _LONG),
            (0.25, _LONGER),
            (0.08, _FAR),
            (0.08, _FARTHER),
            (0.03, Shape(4096, 4352, 1)),
            (0.02, Shape(8192, 8448, 1)),
        ),
        warmup=10,
        decay_from=300,
        mtp_depth=1,
        last=10 / 31,
        muon_rate=0.015,
        adam_rate=2e-3,
        familiar=0.5,
    ),
    "pieces": Stage(
        steps=1500,
        shapes=(
            (0.08, _BRIEF),
            (0.14, _MIDDLE),
            (0.38, _LONG),
            (0.22, _LONGER),
            (0.09, _FAR),
            (0.06, _FARTHER),
            (0.02, Shape(4096, 4352, 1)),
            (0.01, Shape(8192, 8448, 1)),
        ),
        warmup=10,
        decay_from=10,
        mtp_depth=1,
        last=110 / 259,
        muon_rate=0.01,
        adam_rate=2e-3,
        familiar=0.4,
        pieces=True,
    ),
    "end": Stage(
        steps=600,
        shapes=((0.1, _BRIEF), (0.15, _MIDDLE), (0.4, _LONG), (0.2, _LONGER), (0.1, _FAR), (0.05, _FARTHER)),
        warmup=10,
        decay_from=10,
        mtp_depth=1,
        muon_rate=0.005,
        adam_rate=1e-3,
        familiar=0.5,
        pieces=True,
    ),
    "drafts": Stage(
        steps=400,
        shapes=((0.2, _MIDDLE), (0.5, _LONG), (0.3, _LONGER)),
        warmup=10,
        decay_from=60,
        mtp_depth=3,
        drafts_only=True,
        familiar=0.5,
        pieces=True,
    ),
}
"""In the order in which they are run."""


def make_tokenizer(out: Path, seed: int) -> None:
    """Write tokenizer and template to a checkpoint folder."""
    source = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    template, words = ChatTemplate(source), Words(Random(seed), "train")
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
    network = Network(ModelConfig.from_hf(CONFIG))
    plant_induction(network)
    return network
