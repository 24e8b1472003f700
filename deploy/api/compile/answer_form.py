"""The form of an answer: what is looked for in it, and the grammar that holds it to what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from divisi.cluster.triggers import Span
from divisi.deploy.api.body.protocol import ChatBody, GenerationBody
from divisi.deploy.api.body.reasoning import Thinking
from divisi.deploy.api.body.structured import content_grammar
from divisi.deploy.api.body.tools import NamedChoice, Tool, call_rule, is_forced
from divisi.deploy.api.compile.parsing import ParseRule
from divisi.deploy.api.errors import ApiError
from divisi.model.text import TextCodec
from divisi.model.text.grammar.answer import CallRule, OfferedTool, ThinkingRule, answer_grammar
from divisi.model.text.grammar.compiler import GrammarCompiler
from divisi.model.text.tags import CALL, CALL_END, THINK, THINK_END, last_tag, tag_ids


class AnswerForms:
    """Finds the form of each answer. Grammars have a thread of their own, so that a slow one holds up nothing else."""

    def __init__(self, text: TextCodec, grammars: GrammarCompiler) -> None:
        self._text = text
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._ids = tag_ids(text.tokenizer)
        self._tags = {token_id: name for name, token_id in self._ids.items()}

    @property
    def thinks(self) -> bool:
        """Whether answers may think: the template knows that part, and the tokenizer its tags.

        Raises TemplateError for a model without a template.
        """
        return self._text.chat_template().thinks and THINK in self._ids and THINK_END in self._ids

    def parse_rule(self, body: ChatBody, prompt: Sequence[int], tools: Sequence[Tool]) -> ParseRule | None:
        """What to look for in a chat answer; None where it can only be text.

        Raises ApiError where there are tools, but no tokens that tell calls from text.
        """
        thinks = self.thinks
        if tools:
            self._check_tags((CALL, CALL_END), "tools")
        if not thinks and not tools:
            return None
        names = frozenset(tool.function.name for tool in tools)
        if isinstance(body.tool_choice, NamedChoice):
            names = frozenset([body.tool_choice.function.name])
        opened = thinks and self._last_tag(prompt, past_text=bool(body.continue_final_message)) == THINK
        forced = bool(tools) and is_forced(body.tool_choice)
        return ParseRule(self._tags, thinks, opened, names, body.parallel_tool_calls is False, forced)

    def spans(self, body: ChatBody, parse: ParseRule) -> tuple[Span, ...]:
        """Where in an answer the stop ids that the client named mean nothing: in its thinking and its calls.

        Calls are drafted token by token unless the client allows more.
        """
        spans: list[Span] = []
        if parse.thinks:
            spans.append(Span(self._ids[THINK], self._ids[THINK_END], opened=parse.opened, leading=True))
        if parse.names:
            drafts = (body.mtp and body.mtp.tool_call_draft_tokens) or 0
            spans.append(Span(self._ids[CALL], self._ids[CALL_END], max_draft_tokens=drafts))
        return tuple(spans)

    async def content_grammar(self, body: GenerationBody) -> str | None:
        """The grammar of an answer's content; None for free text. Raises ApiError for one that cannot be kept."""
        if body.response_format is None and body.structured_outputs is None:
            return None
        work = partial(content_grammar, self._grammars, body.response_format, body.structured_outputs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def answer_grammar(
        self, body: ChatBody, prompt: Sequence[int], parse: ParseRule | None, thinking: Thinking, tools: Sequence[Tool]
    ) -> str | None:
        """The grammar of the whole answer: of its content alone, unless it also thinks or calls."""
        content = await self.content_grammar(body)
        if parse is None:
            return content
        work = partial(self._whole_grammar, body, prompt, parse, thinking, tools, content)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _whole_grammar(
        self,
        body: ChatBody,
        prompt: Sequence[int],
        parse: ParseRule,
        thinking: Thinking,
        tools: Sequence[Tool],
        content: str | None,
    ) -> str | None:
        parallel = body.parallel_tool_calls is not False
        calls = call_rule(self._grammars, tools, body.tool_choice, parallel=parallel)
        closed = self._last_tag(prompt) == THINK_END
        rule = ThinkingRule(parse.opened, thinking.budget) if parse.thinks and not closed else None
        limited = rule is not None and rule.budget is not None
        if content is None and calls is None and not limited:
            return None
        if calls is None and tools:  # content of a form, or a budget, beside calls that are free
            calls = CallRule(tuple(OfferedTool(tool.function.name) for tool in tools), False, single=not parallel)
        if rule is None and calls is None:
            return content
        return self._grammars.checked(answer_grammar(self._ids, thinking=rule, calls=calls, content=content))

    def _check_tags(self, names: Sequence[str], param: str) -> None:
        for name in names:
            if name not in self._ids:
                raise ApiError(
                    f"{param}: this model's tokenizer has no token {name}, so calls cannot be told from text; "
                    f"leave {param} out",
                    param=param,
                )

    def _last_tag(self, prompt: Sequence[int], *, past_text: bool = False) -> str | None:
        return last_tag(prompt, self._text.tokenizer, self._tags, past_text=past_text)
