"""Which conversations come how often, by the length that a stage of the training has reached."""

from __future__ import annotations

from dataclasses import dataclass

from divisi.model.demo.corpus import chat, recall, tools
from divisi.model.demo.corpus.conversation import Conversation
from divisi.model.demo.corpus.everyday import everyday_tool
from divisi.model.demo.corpus.words import Words

SENTENCE_TOKENS = 16
"""About as many tokens has a sentence of filler."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the conversations; what is left is chat."""

    tools: float = 0.55
    recall: float = 0.23
    dense: float = 0.0
    """Share of the recall that has no filler, but as many facts to tell apart as fit, and asks for them all."""


EVERYTHING = Mix()


def make_conversation(words: Words, length: int, mix: Mix = EVERYTHING) -> Conversation:
    """A conversation of up to about `length` tokens."""
    draw = words.random.random()
    if length >= 2048:
        return long_recall(words, length)
    if length <= 64:
        return copying(words)
    if draw < mix.tools:
        return tool_talk(words, length)
    if draw < mix.tools + mix.recall:
        return dense_recall(words, length) if words.random.random() < mix.dense else short_recall(words, length)
    return chat.make_chat(words, words.random.randint(1, max(1, min(8, length // 40))))


def copying(words: Words) -> Conversation:
    """Little but copying, which everything else is built on."""
    if words.random.random() < 0.4:
        facts = words.random.randint(1, 4)
        return recall.make_recall(words, facts, facts, 0)
    talk = Conversation(kind="echo")
    for _ in range(words.random.randint(1, 3)):
        chat.add_echo(words, talk, words.random.randint(2, 9))
    return talk


def tool_talk(words: Words, length: int) -> Conversation:
    """Tools on offer, then requests, refusals and talk."""
    random = words.random
    talk = Conversation(kind="tools")
    most = 1 if length <= 128 else 3 if length <= 256 else 6
    offered = tools.make_tools(words, random.randint(1, most), everyday_tool)
    talk.tools = [tool.schema for tool in offered]
    if random.random() < 0.15:
        talk.messages.append({"role": "system", "content": "You are a helpful assistant."})
    for _ in range(random.randint(1, max(1, min(8, length // 70)))):
        draw = random.random()
        if draw < 0.7:
            tools.add_call(words, talk, offered, responds=random.random() < 0.4)
        elif draw < 0.88:
            tools.add_refusal(words, talk, offered)
        else:
            question, answer, thought = chat.exchange(words) if random.random() < 0.6 else chat.sum_of(words)
            talk.user(question)
            talk.assistant(answer, thought)
    return talk


def short_recall(words: Words, length: int) -> Conversation:
    """Several facts in a text that fits, most of them asked for."""
    facts = words.random.randint(1, max(2, min(12, length // 40)))
    questions = words.random.randint(1, min(facts, 10))
    room = max(0, length - 26 * facts - 34 * questions)
    return recall.make_recall(words, facts, questions, words.random.randint(0, room // SENTENCE_TOKENS))


def dense_recall(words: Words, length: int) -> Conversation:
    """As many facts as fit, all of them asked for, and nothing else."""
    facts = max(2, min(24, length // 54))
    return recall.make_recall(words, facts, facts, 0)


def long_recall(words: Words, length: int) -> Conversation:
    """Facts far apart, many of them asked for, so that a long text teaches much."""
    facts = words.random.randint(length // 200, length // 80)
    questions = facts * 2 // 3
    filler = (length - 18 * facts - 36 * questions) // SENTENCE_TOKENS
    return recall.make_recall(words, facts, questions, filler)
