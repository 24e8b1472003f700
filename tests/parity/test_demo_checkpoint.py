"""The demo checkpoint as transformers reads it: the same folder, the same greedy tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen3NextForCausalLM

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.evaluation.cases import SKILLS, make_cases
from divisi.model.text.template import ChatTemplate
from tests.parity.engines import local_engine
from tests.parity.oracle import Excuses, Oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(Qwen3NextForCausalLM.from_pretrained(checkpoint_dir(), dtype=torch.float32).eval())


def prompt_of(skill: str) -> list[int]:
    (case,) = make_cases(skill, 1, seed=1)
    template = ChatTemplate((checkpoint_dir() / "chat_template.jinja").read_text(encoding="utf-8"))
    text = template.render(case.messages, tools=case.tools, enable_thinking=case.thinks)
    return list(Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json")).encode(text).ids)


@pytest.mark.parametrize("skill", [skill for skill in SKILLS if skill not in ("recall 4k", "recall 8k")])
def test_greedy_tokens(oracle: Oracle, excuses: Excuses, skill: str) -> None:
    prompt = prompt_of(skill)
    (tokens,) = local_engine(checkpoint_dir(), num_pages=320, max_seqs=1).greedy([prompt], 40)
    excuses.expect_same(oracle, prompt, oracle.greedy(prompt, 40), tokens, skill)
