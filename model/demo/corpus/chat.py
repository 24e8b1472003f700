"""Small talk: about itself, simple topics, the user's name, repeating, and small arithmetic."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from divisi.model.demo.corpus.conversation import Conversation
from divisi.model.demo.corpus.words import NAMES, Words, can_phrase, split_of

_LEADS = ("", "", "", "Please, ", "Hi! ", "Tell me: ", "One question: ", "So, ", "Okay, ", "Now, ", "Hey, ", "Well: ")
_ENDS = ("?", "?", "", ".", "!", " please?")
_SYSTEMS = ("You are a helpful assistant.", "You are Divisi.", "Be brief.", "Answer in one sentence.", "Be kind.")
_SUMS = (
    "what is {x}",
    "{x}",
    "compute {x}",
    "how much is {x}",
    "{x} =",
    "calculate {x}",
    "what does {x} make",
    "solve {x}",
)


@cache
def _known() -> dict[str, Any]:
    """What the model knows: of itself, answers by the questions for them; topics; the sounds of animals."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("smalltalk.json").read_text(encoding="utf-8"))
    return found


def exchange(words: Words) -> tuple[str, str, str]:
    """A question on itself or a simple topic, in one of the split's phrasings, with its answer and a thought."""
    while True:
        core, answer, thought = _question(words)
        if can_phrase((_LEADS, (core,), _ENDS), words.split):
            return _dressed(words, core), answer, thought


def _question(words: Words) -> tuple[str, str, str]:
    draw, known = words.random.random(), _known()
    choose = words.random.choice
    if draw < 0.5:
        answer = choose(list(known["itself"]))
        core, thought = choose(known["itself"][answer]), "The user talks about me."
    elif draw < 0.85:
        topic = choose(list(known["topics"]))
        key = choose(list(known["topics"][topic]))
        core = choose(known["topic_questions"]).format(t=topic, k=key)
        answer, thought = f"The {topic} of {key} is {known['topics'][topic][key]}.", "I know this."
    else:
        animal = choose(list(known["sounds"]))
        core = choose(known["sound_questions"]).format(k=animal)
        answer, thought = f"A {animal} {known['sounds'][animal]}.", "I know this."
    return core, answer, thought


def _dressed(words: Words, core: str) -> str:
    lead, core, end = words.phrasing(_LEADS, (core,), _ENDS)
    text = lead + core + end
    return text[0].upper() + text[1:] if words.random.random() < 0.8 else text


def sum_of(words: Words) -> tuple[str, str, str]:
    """A small sum, its answer and the steps; the pair of numbers belongs to the split."""
    random = words.random
    while True:
        most = random.choice((10, 10, 21, 100))
        a, b, sign = random.randrange(most), random.randrange(most), random.choice("++-*")
        if sign == "*":
            a, b = a % 11, b % 11
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if split_of(f"{a}{sign}{b}") == words.split:
            break
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    spelled = {"+": "plus", "-": "minus", "*": "times"}[sign]
    shown = f"{a} {sign} {b}" if random.random() < 0.7 else f"{a} {spelled} {b}"
    core = random.choice(_SUMS).format(x=shown)
    text = core if random.random() < 0.5 else f"{random.choice(_LEADS)}{core}{random.choice(_ENDS)}"
    return text, f"{a} {sign} {b} = {result}.", f"I compute {a} {sign} {b}. It is {result}."


def add_named(words: Words, talk: Conversation) -> tuple[str, str]:
    """The user gives a name or a liking; returns the question for it and its answer, for later."""
    if words.random.random() < 0.6:
        name = words.of(NAMES) if words.random.random() < 0.3 else words.invented().capitalize()
        form = words.random.choice(
            ("My name is {}.", "I am {}.", "Hi, I am {}.", "Call me {}.", "Hello, my name is {}.")
        )
        talk.user(form.format(name))
        talk.assistant(f"Nice to meet you, {name}!", "The user gives a name.")
        return words.random.choice(("What is my name?", "Who am I?", "Do you know my name?")), f"Your name is {name}."
    thing, liked = words.random.choice(("color", "food", "animal", "city", "song", "book")), words.text()
    talk.user(words.random.choice(("My favorite {} is {}.", "I like one {} best: {}.")).format(thing, liked))
    talk.assistant("Good to know!", "The user tells me something.")
    return f"What is my favorite {thing}?", f"Your favorite {thing} is {liked}."


def add_echo(words: Words, talk: Conversation, count: int) -> None:
    """The user has something of `count` words repeated."""
    kinds = (words.noun, words.invented, words.proper, words.code)
    text = " ".join(words.random.choice(kinds)() for _ in range(count))
    talk.user(
        words.random.choice(("Say: {}", "Repeat: {}", "Repeat after me: {}", "Write: {}", "Echo: {}")).format(text)
    )
    talk.assistant(text, "I repeat it.")


def make_chat(words: Words, turns: int) -> Conversation:
    """Several turns of everything that needs no tools."""
    talk = Conversation(kind="chat")
    if words.random.random() < 0.25:
        talk.messages.append({"role": "system", "content": words.random.choice(_SYSTEMS)})
    later: list[tuple[str, str]] = []
    for _ in range(turns):
        draw = words.random.random()
        if later and draw < 0.3:
            question, answer = later.pop()
            talk.user(question)
            talk.assistant(answer, "The user told me before.")
        elif not later and draw < 0.15:
            later.append(add_named(words, talk))
        elif draw < 0.25:
            add_echo(words, talk, words.random.randint(1, 5))
        else:
            question, answer, thought = sum_of(words) if draw < 0.6 else exchange(words)
            talk.user(question)
            talk.assistant(answer, thought)
    return talk
