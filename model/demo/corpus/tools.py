"""Tools, requests for them, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from divisi.model.demo.corpus.conversation import Conversation
from divisi.model.demo.corpus.words import Words

NO_TOOL = "Sorry, I have no tool for that."

_OPENINGS = ("", "", "", "Please ", "Can you ", "Could you ", "I want you to ", "I need you to ", "Now ", "Hi, please ",
             "Hello! Please ", "Would you ", "Go ahead and ", "Kindly ", "Next, ", "You should ")  # fmt: skip
_JOINS = (" with ", " with ", ", ", ": ", " using ", " where ", " and use ", " for ")
_ARTICLES = (" the ", " a ", " my ", " this ", " that ", " our ", " ", " one ")
_VALUES = ("{p} {v}", "{p} {v}", "{p} is {v}", "{p} = {v}", "{p}: {v}", "{p} set to {v}", "the {p} {v}", "{p} of {v}",
           "{v} as {p}", "{v} as the {p}")  # fmt: skip
_ENDS = ("", "", ".", ".", "!", " please.", ", thanks.", " now.", "?")
_DESCRIPTIONS = ("{V} the {n}.", "{V} a {n}.", "{V} {n}", "Used to {v} the {n}.", "{V} one {n}.", "Can {v} any {n}.")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with its verb and noun, by which users ask for it."""

    name: str
    verb: str
    noun: str
    schema: dict[str, Any]
    optional: tuple[str, ...]
    ask: Callable[[Words], tuple[str, dict[str, Any]]] | None = None
    """Its own ways to be asked for: a request and its arguments."""

    @property
    def properties(self) -> dict[str, Any]:
        """Parameters by name."""
        found: dict[str, Any] = self.schema["function"]["parameters"]["properties"]
        return found


def make_tool(words: Words, verb: str | None = None, noun: str | None = None, most: int = 4, snake: int = 5) -> Tool:
    """A tool with up to `most` parameters. Its name is verb_noun `snake` times as often as it is in another style."""
    random = words.random
    verb, noun = verb or words.verb(), noun or words.noun()
    styles = (f"{verb}_{noun}",) * snake + (f"{noun}_{verb}", f"{verb}{noun.capitalize()}", f"{verb}-{noun}")
    name = random.choice(styles)
    names = list(
        dict.fromkeys(words.parameter() for _ in range(random.randint(0 if random.random() < 0.1 else 1, most)))
    )
    properties = {parameter: _schema(words) for parameter in names}
    optional = tuple(parameter for parameter in names if random.random() < 0.12)
    function: dict[str, Any] = {"name": name}
    if random.random() < 0.8:
        function["description"] = random.choice(_DESCRIPTIONS).format(v=verb, V=verb.capitalize(), n=noun)
    required = [parameter for parameter in names if parameter not in optional]
    function["parameters"] = {"type": "object", "properties": properties, "required": required}
    return Tool(name, verb, noun, {"type": "function", "function": function}, optional)


def _schema(words: Words) -> dict[str, Any]:
    draw = words.random.random()
    if draw < 0.5:
        return {"type": "string"}
    if draw < 0.7:
        return {"type": "integer"}
    if draw < 0.78:
        return {"type": "number"}
    if draw < 0.86:
        return {"type": "boolean"}
    if draw < 0.95:
        count = words.random.randint(2, 4)
        return {"type": "string", "enum": list(dict.fromkeys(words.text().split()[0].lower() for _ in range(count)))}
    return {"type": "array", "items": {"type": "string"}}


def _value(words: Words, schema: dict[str, Any]) -> tuple[Any, str]:
    """A value and how a user says it."""
    random = words.random
    if "enum" in schema:
        value = random.choice(schema["enum"])
        return value, value
    kind = schema["type"]
    if kind == "integer":
        whole = words.integer() if random.random() < 0.93 else -words.integer() - 1
        return whole, str(whole)
    if kind == "number":
        number = f"{words.integer() % 1000}.{random.randrange(1, 10)}"
        return float(number), number
    if kind == "boolean":
        value = random.random() < 0.5
        return value, random.choice(("true", "on", "yes") if value else ("false", "off", "no"))
    if kind == "array":
        items = [words.text().split()[0] for _ in range(random.randint(1, 3))]
        said = ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
        return items, said
    text = words.text()
    return text, random.choice((text, text, text, f'"{text}"'))


def make_request(words: Words, tool: Tool) -> tuple[str, dict[str, Any]]:
    """What a user says to have a tool called, without opening or end, and the arguments."""
    if tool.ask is not None:
        return tool.ask(words)
    random = words.random
    arguments: dict[str, Any] = {}
    said: list[str] = []
    form, article, join = words.phrasing(_VALUES, _ARTICLES, _JOINS)
    for parameter, schema in tool.properties.items():
        if parameter in tool.optional and random.random() < 0.5:
            continue
        arguments[parameter], text = _value(words, schema)
        shown = parameter if random.random() < 0.5 else parameter.replace("_", " ")
        said.append((form if random.random() < 0.8 else random.choice(_VALUES)).format(p=shown, v=text))
    if len(said) > 1 and random.random() < 0.25:
        random.shuffle(said)
    request = f"{tool.verb}{article}{tool.noun}"
    if said:
        listed = ", ".join(said[:-1]) + random.choice((" and ", ", ", " and ")) + said[-1] if len(said) > 1 else said[0]
        request += join + listed
    return request, arguments


def dress(words: Words, request: str) -> str:
    """A request as a whole sentence."""
    opening, end = words.phrasing(_OPENINGS, _ENDS)
    text = opening + request + end
    return text[0].upper() + text[1:] if words.random.random() < 0.8 else text


def make_tools(
    words: Words, count: int, everyday: Callable[[Words], Tool], most: int = 4, snake: int = 5, alike: float = 0.3
) -> list[Tool]:
    """Tools of different names with up to `most` parameters; some are of everyday use.

    `alike`: share of the others, after the first, that have another one's verb or noun.
    """
    tools: list[Tool] = []
    share = words.random.choice((0.0, 0.0, 0.3, 1.0))
    while len(tools) < count:
        if words.random.random() < share:
            tool = everyday(words)
            if all(tool.name != known.name for known in tools):
                tools.append(tool)
            continue
        other = words.random.choice(tools) if tools and words.random.random() < alike else None
        share_verb = words.random.random() < 0.5
        tool = make_tool(
            words,
            other.verb if other and share_verb else None,
            other.noun if other and not share_verb else None,
            most,
            snake,
        )
        if all((tool.verb, tool.noun) != (known.verb, known.noun) and tool.name != known.name for known in tools):
            tools.append(tool)
    return tools


def foreign_request(words: Words, tools: list[Tool]) -> str:
    """A request that none of the tools serves, near one of them or far."""
    while True:
        near = words.random.choice(tools) if words.random.random() < 0.3 else None
        by_verb = words.random.random() < 0.5
        tool = make_tool(words, near.verb if near and by_verb else None, near.noun if near and not by_verb else None)
        if all((tool.verb, tool.noun) != (known.verb, known.noun) for known in tools):
            return make_request(words, tool)[0]


def answer_of_tool(words: Words) -> tuple[str, str]:
    """What a tool returns, and the sentence that tells it."""
    random = words.random
    draw = random.random()
    if draw < 0.15:
        return random.choice(('{"status": "ok"}', '{"ok": true}', "ok", "done")), "Done."
    if draw < 0.25:
        text = " ".join((words.noun(), words.invented()))
        return json.dumps({"error": text}), f"That failed: {text}."
    if draw < 0.4:
        text = " ".join(
            random.choice((words.noun, words.invented, words.proper))() for _ in range(random.randint(1, 4))
        )
        return text, f"The result is {text}."
    fields: dict[str, Any] = {}
    for _ in range(random.choice((1, 1, 2, 2, 3))):
        fields[words.parameter()] = random.choice((words.integer(), words.text(), words.text(), words.integer() / 10))
    told = [f"the {name.replace('_', ' ')} is {value}" for name, value in fields.items()]
    sentence = ", ".join(told[:-1]) + " and " + told[-1] if len(told) > 1 else told[0]
    return json.dumps(fields, ensure_ascii=False), f"{sentence[0].upper()}{sentence[1:]}."


def add_call(words: Words, talk: Conversation, tools: list[Tool], responds: bool, several: bool | None = None) -> None:
    """A request, the call or calls it needs, and perhaps what comes of them. `several`: None to draw it."""
    random = words.random
    several = random.random() < 0.22 if several is None else several
    chosen = [random.choice(tools) for _ in range(random.choice((2, 2, 3)))] if several else [random.choice(tools)]
    requests = [make_request(words, tool) for tool in chosen]
    joined = random.choice((", then ", " and also ", "; and ", ". Then ")).join(request for request, _ in requests)
    thought = f"I need {' and '.join(tool.name for tool in chosen)}."
    talk.user(dress(words, joined))
    talk.calls([(tool.name, arguments) for tool, (_, arguments) in zip(chosen, requests, strict=True)], thought)
    if not responds:
        return
    answers = [answer_of_tool(words) for _ in chosen]
    for returned, _ in answers:
        talk.tool(returned)
    talk.assistant(" ".join(sentence for _, sentence in answers), "The tool has answered.")


def add_refusal(words: Words, talk: Conversation, tools: list[Tool]) -> None:
    """A request that no tool serves."""
    talk.user(dress(words, foreign_request(words, tools)))
    talk.assistant(NO_TOOL, "No tool fits.")
