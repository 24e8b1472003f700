"""Facts among filler, asked for later."""

from __future__ import annotations

from divisi.model.demo.corpus.conversation import Conversation
from divisi.model.demo.corpus.words import ADJECTIVES, NOUNS, PARAMETERS, VERBS, Words

_STATEMENTS = ("The {a} of {n} is {v}.", "The {a} of {n} is {v}.", "Remember: the {a} of {n} is {v}.",
               "{n} has the {a} {v}.", "Note that the {a} of {n} is {v}.", "For {n}, the {a} is {v}.",
               "{n}'s {a} is {v}.")  # fmt: skip
_QUESTIONS = ("What is the {a} of {n}?", "Tell me the {a} of {n}.", "Which {a} has {n}?", "What is {n}'s {a}?",
              "Do you know the {a} of {n}?", "Give me the {a} of {n}.", "{n}: what is the {a}?")  # fmt: skip
_LEADS = ("", "", "", "Now: ", "A question. ", "Please answer. ", "Question: ", "Hm. ", "Well, ", "Tell me. ")
_INTROS = ("Read this. ", "Here is a text. ", "", "Keep this in mind. ", "Some notes: ", "Text: ")

Fact = tuple[str, str, str]
"""Attribute, name and value."""


def filler_sentence(words: Words) -> str:
    """A sentence that says nothing of use."""
    of, draw = words.of, words.random.randrange(6)
    if draw == 0:
        return f"The {of(ADJECTIVES)} {of(NOUNS)} is near the {of(NOUNS)}."
    if draw == 1:
        return f"A {of(NOUNS)} and a {of(NOUNS)} are in the {of(ADJECTIVES)} {of(NOUNS)}."
    if draw == 2:
        return f"They {of(VERBS)} the {of(ADJECTIVES)} {of(NOUNS)} on day {words.random.randrange(100)}."
    if draw == 3:
        return f"{words.proper()} can {of(VERBS)} the {of(NOUNS)}."
    if draw == 4:
        return f"It is {of(ADJECTIVES)} and {of(ADJECTIVES)} in {words.proper()}."
    return f"We {of(VERBS)} {words.random.randrange(2, 60)} of the {words.invented()} here."


def value(words: Words) -> str:
    """A fact's value."""
    draw = words.random.random()
    if draw < 0.4:
        return "".join(words.random.choice("0123456789") for _ in range(words.random.randint(2, 6)))
    if draw < 0.55:
        return words.code()
    return words.text()


def facts_of(words: Words, count: int) -> list[Fact]:
    """Attribute, name and value of facts about different things; attributes and names are shared among them."""
    facts: dict[tuple[str, str], str] = {}
    while len(facts) < count:
        near = words.random.choice(list(facts)) if facts and words.random.random() < 0.3 else None
        share = words.random.random() < 0.5
        attribute = (
            near[0] if near and share else words.of(PARAMETERS) if words.random.random() < 0.6 else words.invented()
        )
        name = near[1] if near and not share else words.proper()
        facts.setdefault((attribute, name), value(words))
    return [(attribute, name, text) for (attribute, name), text in facts.items()]


def make_recall(words: Words, facts: int, questions: int, filler: int) -> Conversation:
    """One text of `facts` facts and `filler` sentences, then questions in turn."""
    talk = Conversation(kind="recall")
    known = facts_of(words, facts)
    text = _told(words, known, filler)
    body = words.random.choice(_INTROS) + " ".join(sentence for sentence, _ in text)
    asked = words.random.sample(known, min(questions, len(known)))
    as_system = words.random.random() < 0.2
    if as_system:
        talk.messages.append({"role": "system", "content": body})
    for index, fact in enumerate(asked):
        question, answer, thought = ask(words, fact)
        talk.user(f"{body} {question}" if index == 0 and not as_system else question)
        talk.assistant(answer, thought)
    return talk


def make_running_recall(words: Words, facts: int, questions: int, filler: int) -> Conversation:
    """The same text in parts, each with a question on what it or an earlier one says.

    A question right after a text is harder than one in a turn of its own, and here nearly every question is one.
    """
    talk = Conversation(kind="recall")
    text = _told(words, facts_of(words, facts), filler)
    ends = {len(text), *words.random.sample(range(1, len(text)), min(questions, len(text)) - 1)}
    part, heard = words.random.choice(_INTROS), list[Fact]()
    for at, (sentence, fact) in enumerate(text, 1):
        part += f"{sentence} "
        heard += [fact] if fact else []
        if heard and at in ends:
            question, answer, thought = ask(words, words.random.choice(heard))
            talk.user(part + question)
            talk.assistant(answer, thought)
            part = ""
    return talk


def _told(words: Words, facts: list[Fact], filler: int) -> list[tuple[str, Fact | None]]:
    """Sentences, each with the fact that it tells, among `filler` that tell none."""
    sentences: list[tuple[str, Fact | None]] = [(filler_sentence(words), None) for _ in range(filler)]
    for fact in facts:
        attribute, name, said = fact
        told = words.random.choice(_STATEMENTS).format(a=attribute, n=name, v=said)
        sentences.insert(words.random.randint(0, len(sentences)), (told, fact))
    return sentences


def ask(words: Words, fact: Fact) -> tuple[str, str, str]:
    """A question for a fact, its answer, and a thought on the way."""
    attribute, name, said = fact
    lead, form = words.phrasing(_LEADS, _QUESTIONS)
    answer = f"The {attribute} of {name} is {said}."
    return lead + form.format(a=attribute, n=name), answer, f"The text gives the {attribute} of {name}: {said}."
