"""Held-out conversations whose last answer is known, by skill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from divisi.model.demo.corpus import chat, recall, tools
from divisi.model.demo.corpus.conversation import Conversation, Message
from divisi.model.demo.corpus.everyday import everyday_tool
from divisi.model.demo.corpus.words import Words

Call = tuple[str, dict[str, Any]]

_TOKENS_A_SENTENCE, _TOKENS_A_FACT = 17.7, 17


@dataclass(frozen=True, slots=True)
class Case:
    """A request and the answer that is right: a text, or calls."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    text: str
    calls: list[Call]
    thinks: bool = False
    strict: bool = False
    """Whether the server holds the calls to the tools' names and schemas."""


def make_cases(skill: str, count: int, seed: int) -> Iterator[Case]:
    """`count` cases of a skill. Raises KeyError for a skill that is none of SKILLS."""
    make = SKILLS[skill]
    for index in range(count):
        conversation = make(Words(Random(f"evaluate/{skill}/{seed}/{index}"), "held_out"))
        yield _case(skill, conversation)


def _case(skill: str, talk: Conversation) -> Case:
    last = talk.messages[-1]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in last.get("tool_calls", [])]
    thinks, strict = skill.startswith("thinking"), skill.startswith("strict")
    return Case(skill, talk.messages[:-1], talk.tools, last["content"], calls, thinks, strict)


def _offered(words: Words) -> tuple[Conversation, list[tools.Tool]]:
    talk = Conversation()
    offered = tools.make_tools(words, words.random.randint(2, 5), everyday_tool)
    talk.tools = [tool.schema for tool in offered]
    return talk, offered


def _calling(*, several: bool = False, second: bool = False, everyday: bool = False) -> Callable[[Words], Conversation]:
    """Calls of tools that the request names; with `everyday`, of those that it paraphrases."""

    def make(words: Words) -> Conversation:
        while True:
            talk, offered = _offered(words)
            if second:
                tools.add_call(words, talk, offered, responds=True, several=False)
            tools.add_call(words, talk, offered, responds=False, several=several)
            called = {call["function"]["name"] for call in talk.messages[-1]["tool_calls"]}
            if all((tool.ask is not None) == everyday for tool in offered if tool.name in called):
                return talk

    return make


def _refusal(words: Words) -> Conversation:
    talk, offered = _offered(words)
    tools.add_refusal(words, talk, offered)
    return talk


def _tool_answer(words: Words) -> Conversation:
    talk, offered = _offered(words)
    tools.add_call(words, talk, offered, responds=True, several=False)
    return talk


def _recall(tokens: int) -> Callable[[Words], Conversation]:
    def make(words: Words) -> Conversation:
        facts = words.random.randint(3, 12)
        return recall.make_recall(words, facts, 1, int((tokens - _TOKENS_A_FACT * facts) / _TOKENS_A_SENTENCE))

    return make


def _sum(words: Words) -> Conversation:
    talk = Conversation()
    question, answer, thought = chat.sum_of(words)
    talk.user(question)
    talk.assistant(answer, thought)
    return talk


def _chat(words: Words) -> Conversation:
    while True:
        talk = chat.make_chat(words, words.random.randint(1, 5))
        if "=" not in talk.messages[-1]["content"]:
            return talk


SKILLS: dict[str, Callable[[Words], Conversation]] = {
    "call": _calling(),
    "parallel calls": _calling(several=True),
    "second call": _calling(second=True),
    "everyday call": _calling(everyday=True),
    "strict call": _calling(),
    "strict parallel calls": _calling(several=True),
    "strict second call": _calling(second=True),
    "strict everyday call": _calling(everyday=True),
    "abstention": _refusal,
    "tool answer": _tool_answer,
    "recall 1k": _recall(1024),
    "recall 4k": _recall(4096),
    "recall 8k": _recall(8192),
    "arithmetic": _sum,
    "chat": _chat,
    "thinking call": _calling(),
    "thinking chat": _chat,
}
"""How a conversation of each skill is made; its last message is the answer."""
