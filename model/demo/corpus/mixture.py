"""Which conversations come how often, by the length that a stage of the training has reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from divisi.model.demo.corpus import chat, recall, tools
from divisi.model.demo.corpus.conversation import Conversation
from divisi.model.demo.corpus.everyday import everyday_tool
from divisi.model.demo.corpus.words import Words

SENTENCE_TOKENS = 17
"""About as many tokens has a sentence of filler."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the conversations; what is left is chat."""

    tools: float = 0.55
    recall: float = 0.23
    dense: float = 0.0
    """Share of the recall that has no filler, but as many facts to tell apart as fit, and asks for them all."""
    running: float = 0.0
    """Share of the other recall that asks all along the text instead of at its end."""
    busy: float = 0.0
    """Share of the tool talk that is one request after the other for many tools."""


EVERYTHING = Mix()


def make_conversation(words: Words, length: int, mix: Mix = EVERYTHING) -> Conversation:
    """A conversation of up to about `length` tokens."""
    draw = words.random.random()
    if length >= 2048:
        return long_recall(words, length, mix.running)
    if length <= 64:
        return copying(words)
    if draw < mix.tools:
        return busy_tools(words, length) if words.random.random() < mix.busy else tool_talk(words, length)
    if draw < mix.tools + mix.recall:
        dense = words.random.random() < mix.dense
        return dense_recall(words, length) if dense else short_recall(words, length, mix.running)
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


def busy_tools(words: Words, length: int) -> Conversation:
    """Many tools, and as many requests as fit: most of the text is to choose the right one and to fill it in."""
    random = words.random
    talk, most = Conversation(kind="tools"), random.choice((1, 2, 3, 4))
    count, alike = random.randint(2, max(2, min(9, length // 80))), random.choice((0.3, 0.9, 0.9))
    offered = tools.make_tools(words, count, everyday_tool, most, snake=2, alike=alike)
    talk.tools = [tool.schema for tool in offered]
    room = length - 70 - (32 + 8 * most) * len(offered)
    for _ in range(max(1, room // (52 + 10 * most))):
        if random.random() < 0.1:
            tools.add_refusal(words, talk, offered)
        else:
            tools.add_call(words, talk, offered, responds=random.random() < 0.04)
    return talk


def short_recall(words: Words, length: int, running: float) -> Conversation:
    """Several facts in a text that fits, most of them asked for."""
    facts = words.random.randint(1, max(2, min(12, length // 40)))
    questions = words.random.randint(1, min(facts, 10))
    room = max(0, length - 26 * facts - 34 * questions)
    return _way(words, running)(words, facts, questions, words.random.randint(0, room // SENTENCE_TOKENS))


def dense_recall(words: Words, length: int) -> Conversation:
    """As many facts as fit, all of them asked for, and nothing else."""
    facts = max(2, min(24, length // 54))
    return recall.make_recall(words, facts, facts, 0)


def long_recall(words: Words, length: int, running: float) -> Conversation:
    """Facts far apart, many of them asked for, so that a long text teaches much."""
    facts = words.random.randint(length // 200, length // 80)
    questions = facts * 2 // 3
    filler = (length - 18 * facts - 36 * questions) // SENTENCE_TOKENS
    return _way(words, running)(words, facts, questions, filler)


def _way(words: Words, running: float) -> Callable[[Words, int, int, int], Conversation]:
    return recall.make_running_recall if words.random.random() < running else recall.make_recall
