"""How a chat looks: answers as they come, reasoning dimmed, tool calls one argument a line."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from divisi.deploy.cli.chat.conversation import Conversation, Reply, ToolCall

# A model can write any character; on a terminal, control characters would be obeyed.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


def harmless(text: str) -> str:
    """`text` with control characters made visible instead of obeyed."""
    return text.translate(_VISIBLE)


class Screen:
    """Writes one conversation to a console."""

    def __init__(self, console: Console, clock: Callable[[], float], *, reasoning: bool = True) -> None:
        self._console = console
        self._reasoning = reasoning
        self._clock = clock
        self._part = ""
        self._asked = self._first = 0.0

    def begin(self) -> None:
        """A request is sent now."""
        self._part, self._first, self._asked = "", 0.0, self._clock()

    def show(self, part: str, text: str) -> None:
        """Write a piece of "reasoning" or "content"."""
        self._first = self._first or self._clock()
        if part == "reasoning" and not self._reasoning:
            return
        if part != self._part and self._part:
            self._console.print("\n")
        self._part = part
        self._write(text, "dim italic" if part == "reasoning" else "")

    def end(self, answer: Reply, *, stopped: bool = False) -> None:
        """Finish an answer: its tool calls, then a line of numbers."""
        if self._part:
            self._console.print()
        for call in answer.calls:
            self.call(call)
        self._console.print(Text(self._numbers(answer, stopped), style="dim"), soft_wrap=True)

    def call(self, call: ToolCall) -> None:
        """A tool call: its name, then an argument a line; as it came where it is no JSON object."""
        self._console.print(Text.assemble(("call ", "cyan"), (harmless(call.name), "bold cyan")), soft_wrap=True)
        try:
            arguments = json.loads(call.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            self._write(f"  {call.arguments}\n", "yellow")
            return
        for name, value in arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            line = Text.assemble("  ", (harmless(name), "cyan"), ": ", harmless(shown))
            self._console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        """A word of the program's own."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def error(self, text: str) -> None:
        """What went wrong."""
        self._console.print(Text(harmless(text), style="red"), soft_wrap=True)

    def parameters(self, conversation: Conversation) -> None:
        """What every request carries."""
        self.note(f"model: {conversation.model}")
        self.note(f"system: {conversation.system or '(none)'}")
        for name, value in conversation.params.items():
            self.note(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        if conversation.tools:
            self.note("tools: " + ", ".join(tool["function"]["name"] for tool in conversation.tools))

    def _write(self, text: str, style: str) -> None:
        self._console.print(Text(harmless(text), style=style), end="", soft_wrap=True)

    def _numbers(self, answer: Reply, stopped: bool) -> str:
        reason = "stopped" if stopped else answer.finish_reason or "no finish reason"
        parts = [{"length": "cut at the token limit"}.get(reason, reason)]
        tokens = answer.usage.get("completion_tokens")
        if tokens is not None:
            parts.append(f"{answer.usage.get('prompt_tokens', '?')} tokens in, {tokens} out")
        if self._first:
            parts.append(f"{self._first - self._asked:.2f} s to the first")
            seconds = self._clock() - self._first
            if tokens is not None and tokens > 1 and seconds > 0:
                parts.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
        details = answer.usage.get("completion_tokens_details") or {}
        accepted, rejected = (details.get(f"{kind}_prediction_tokens") or 0 for kind in ("accepted", "rejected"))
        if accepted or rejected:
            parts.append(f"{accepted} of {accepted + rejected} drafts stood")
        return "[" + ", ".join(parts) + "]"
