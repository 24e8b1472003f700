"""Chat templates: sandboxed Jinja with the environment that Hugging Face templates are written for."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from divisi.model.text.errors import TemplateError
from divisi.model.text.literal import MARKS

MAX_TEMPLATE_CHARS = 1 << 20
"""Longest template that is compiled."""
MAX_RENDERED_CHARS = 1 << 26
"""Longest text that a template may produce; a runaway template stops here."""


class ChatTemplate:
    """A compiled chat template; `render` is safe to call from several threads."""

    def __init__(self, source: str, *, variables: Mapping[str, str] | None = None) -> None:
        """`variables`: special tokens that templates name (`bos_token`, `eos_token`). Raises TemplateError."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are taken")
        self._variables = dict(variables or {})
        self.thinks = "<think>" in source
        """Whether the template knows a thinking part."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        max_chars: int = MAX_RENDERED_CHARS,
        **arguments: Any,
    ) -> str:
        """The prompt of a conversation. Raises TemplateError where the template refuses it or runs away.

        `arguments` reach the template by name, as `chat_template_kwargs` do.
        """
        context = {**arguments, **self._variables}
        context |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(context):
                size += len(piece)
                if size > max_chars:
                    raise TemplateError(f"the rendered conversation has more than {max_chars} characters")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses the conversation: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            if isinstance(error, TemplateError):
                raise
            # What template code raises on a conversation that its author didn't think of.
            raise TemplateError(f"the chat template failed on the conversation: {error}") from error
        except RecursionError as error:
            raise TemplateError("the chat template recurses without end on the conversation") from error
        return "".join(pieces)

    def check(self) -> None:
        """Raise TemplateError where the template refuses the plainest conversations: with and without a system message.

        A template that compiles may still name what no engine gives it; then every conversation would fail.
        """
        user = {"role": "user", "content": "Hello"}
        try:
            self.render([user])
        except TemplateError as refusal:
            try:
                self.render([{"role": "system", "content": "Be brief."}, user])  # some ask for one
            except TemplateError:
                raise refusal from None

    def render_continued(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The prompt of a conversation up to the end of its last message, for an answer that goes on with it.

        Raises TemplateError where the template doesn't show that message as it is, as in transformers.
        """
        last = (messages[-1].get("content") or "") if messages else ""
        if not last.strip():
            raise TemplateError("the last message cannot be continued: it is empty")
        mark = secrets.token_hex(16)
        marked = [*messages[:-1], {**messages[-1], "content": last + mark + " "}]
        rendered = self.render(marked, **{**arguments, "add_generation_prompt": False})
        before, found, after = rendered.rpartition(mark)
        if not found:
            raise TemplateError("the last message cannot be continued: the chat template changes it")
        # Blanks at its end stay where the template keeps the one after the mark.
        return before if after.startswith(" ") else before.rstrip()


_SURROGATES = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
"""A character past U+FFFF as JSON escapes it."""


def _environment() -> ImmutableSandboxedEnvironment:
    # Whitespace options, extension, filter and globals as in transformers' chat_template_utils: published templates
    # rely on each of them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; when serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class types it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no model has seen in training."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _SURROGATES.sub(_kept_mark, text) if ensure_ascii else text


def _kept_mark(found: re.Match[str]) -> str:
    """A mark, which stands for a letter that is not escaped; any other character stays as it is."""
    pair = bytes.fromhex(found[1] + found[2])
    char = pair.decode("utf-16-be")
    return char if ord(char) in MARKS else found[0]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
