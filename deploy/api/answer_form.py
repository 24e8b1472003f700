"""The form of an answer: what is looked for in it, and the grammar that holds it to what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from divisi.deploy.api.errors import ApiError
from divisi.deploy.api.parsing import ParseRule
from divisi.deploy.api.protocol import ChatBody, GenerationBody
from divisi.deploy.api.reasoning import Thinking
from divisi.deploy.api.structured import content_grammar
from divisi.deploy.api.tools import NamedChoice, Tool, call_rule
from divisi.model.text import TextCodec
from divisi.model.text.answer_grammar import CallRule, OfferedTool, ThinkingRule, answer_grammar
from divisi.model.text.grammar import GrammarCompiler
from divisi.model.text.reasoning import CLOSE, leaves_open

_PROMPT_END = 8
"""Last tokens of a prompt that tell whether it ends inside a thinking part."""


class AnswerForms:
    """Finds the form of each answer. Grammars are compiled in a thread: a large one takes tens of milliseconds."""

    def __init__(self, text: TextCodec, grammars: GrammarCompiler) -> None:
        self._text = text
        self._grammars = grammars

    def parse_rule(
        self, body: ChatBody, prompt: Sequence[int], tools: Sequence[Tool], *, thinks: bool
    ) -> ParseRule | None:
        """What to look for in a chat answer; None where it can only be text."""
        if not thinks and not tools:
            return None
        names = frozenset(tool.function.name for tool in tools)
        if isinstance(body.tool_choice, NamedChoice):
            names = frozenset([body.tool_choice.function.name])
        opened = thinks and leaves_open(self._end_of(prompt))
        return ParseRule(thinks, opened, names, single=body.parallel_tool_calls is False)

    async def content_grammar(self, body: GenerationBody) -> str | None:
        """The grammar of an answer's content; None for free text. Raises ApiError for one that cannot be kept."""
        if body.response_format is None and body.structured_outputs is None:
            return None
        return await asyncio.to_thread(content_grammar, self._grammars, body.response_format, body.structured_outputs)

    async def answer_grammar(
        self, body: ChatBody, prompt: Sequence[int], parse: ParseRule | None, thinking: Thinking, tools: Sequence[Tool]
    ) -> str | None:
        """The grammar of the whole answer: of its content alone, unless it also thinks or calls."""
        content = await self.content_grammar(body)
        if parse is None:
            return content
        return await asyncio.to_thread(self._whole_grammar, body, self._end_of(prompt), parse, thinking, tools, content)

    def _whole_grammar(
        self,
        body: ChatBody,
        prompt_end: str,
        parse: ParseRule,
        thinking: Thinking,
        tools: Sequence[Tool],
        content: str | None,
    ) -> str | None:
        parallel = body.parallel_tool_calls is not False
        calls = call_rule(self._grammars, tools, body.tool_choice, parallel=parallel)
        closed = prompt_end.rstrip().endswith(CLOSE)
        rule = ThinkingRule(parse.opened, thinking.budget) if parse.thinks and not closed else None
        limited = rule is not None and rule.budget is not None
        if content is None and calls is None and not limited:
            return None
        if calls is None and tools:  # content of a form, or a budget, beside calls that are free
            calls = CallRule(tuple(OfferedTool(tool.function.name) for tool in tools), False, single=not parallel)
        if rule is None and calls is None:
            return content
        self._check_tags(thinking=rule is not None, calls=calls is not None)
        return self._grammars.checked(answer_grammar(thinking=rule, calls=calls, content=content))

    def _check_tags(self, *, thinking: bool, calls: bool) -> None:
        tags = [("<think>", thinking), ("</think>", thinking), ("<tool_call>", calls), ("</tool_call>", calls)]
        for tag, needed in tags:
            if needed and self._text.tokenizer.id_of(tag) is None:
                raise ApiError(
                    f"this model's tokenizer has no token {tag}, so no grammar can hold its answer to it; leave out "
                    "strict, a forced tool_choice, response_format and thinking budgets",
                    param="tools" if calls else "thinking_token_budget",
                )

    def _end_of(self, prompt: Sequence[int]) -> str:
        return self._text.tokenizer.decode(prompt[-_PROMPT_END:], skip_special=False)
