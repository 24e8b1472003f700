"""`divisi chat`: talk to any OpenAI-compatible server from a terminal, or from a pipe."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divisi.deploy.cli.flags import add_connection_flags

if TYPE_CHECKING:
    import httpx

    from divisi.deploy.cli.chat.conversation import Conversation

EXAMPLES = """\
examples:
  divisi chat                                          talk to the server on this machine
  divisi chat --base-url https://host/v1 --api-key @key.txt --model NAME
  divisi chat -p temperature=0 -p max_tokens=200       fields of every request; /params changes them
  divisi chat --tools tools.json                       you type the results of the tools that it calls
  divisi chat "What is 2 + 2?"                         one answer on standard output
  git diff | divisi chat "Review this:" > review.md    the same, with a file or a pipe as the rest of the question

Type /help inside. Ctrl-C stops an answer, Ctrl-D leaves.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "chat",
        help="talk to a server",
        description="Talk to any OpenAI-compatible server. With a question or piped input it answers once and ends.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="answer this and end")
    add_connection_flags(parser)
    chat = parser.add_argument_group("conversation")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument(
        "-p", "--param", metavar="NAME=VALUE", action="append", default=[],
        help="a field of every request; the value is JSON or text, as in stop='[\"\\n\"]'; repeatable",
    )  # fmt: skip
    chat.add_argument("--tools", metavar="FILE", type=Path, help="JSON list of tools, as in the API's `tools`")
    chat.add_argument("--no-reasoning", action="store_true", help="do not show the model's reasoning")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Chat, or answer once. Raises SettingsError and RemoteError."""
    # late: `divisi --help` should not pay for them
    import httpx

    from divisi.deploy.cli.remote import connection, pick_model

    question = _question(args.question)
    with httpx.Client(**connection(args)) as client:
        conversation = _conversation(args)
        conversation.model = pick_model(client, args.model)
        if question is not None:
            return _answer_once(client, conversation, question, reasoning=not args.no_reasoning)
        return _talk(client, conversation, reasoning=not args.no_reasoning)


def _question(argument: str | None) -> str | None:
    """What to ask once: the argument, then what comes through a pipe; None to talk."""
    stdin = sys.stdin  # None where it is closed
    terminal = stdin is not None and stdin.isatty()
    piped = "" if stdin is None or terminal else stdin.buffer.read().decode("utf-8", errors="replace").strip()
    if terminal and argument is None:
        return None
    from divisi.deploy.settings import SettingsError

    question = "\n\n".join(part for part in (argument, piped) if part)
    if not question:
        raise SettingsError("nothing to ask: give a QUESTION, pipe one in, or run `divisi chat` in a terminal")
    return question


def _conversation(args: argparse.Namespace) -> Conversation:
    from divisi.deploy.cli.chat.conversation import Conversation, ParameterError
    from divisi.deploy.settings import SettingsError

    conversation = Conversation(model="", system=args.system, tools=[] if args.tools is None else _tools(args.tools))
    try:
        for assignment in args.param:
            conversation.set(assignment)
    except ParameterError as error:
        raise SettingsError(f"--param: {error}") from None
    return conversation


def _tools(path: Path) -> list[dict[str, Any]]:
    import json

    from divisi.deploy.settings import SettingsError

    try:
        tools = json.loads(path.read_bytes())
        if not isinstance(tools, list):
            raise TypeError
        _ = [tool["function"]["name"] for tool in tools]
    except OSError as error:
        raise SettingsError(f"--tools: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise SettingsError(
            f'--tools: {path}: must be a JSON list like [{{"type": "function", "function": {{"name": "now"}}}}]'
        ) from None
    return tools


def _answer_once(client: httpx.Client, conversation: Conversation, question: str, *, reasoning: bool) -> int:
    """The answer on standard output, nothing else there; reasoning and tool calls on standard error."""
    from rich.console import Console

    from divisi.deploy.cli.chat.conversation import Reply
    from divisi.deploy.cli.chat.screen import Screen, harmless
    from divisi.deploy.cli.chat.session import receive_answer

    aside = Screen(Console(stderr=True), time.monotonic)
    to_terminal = sys.stdout.isatty()

    def show(part: str, text: str) -> None:
        if part == "content":
            sys.stdout.write(harmless(text) if to_terminal else text)
            sys.stdout.flush()
        elif reasoning:
            aside.show(part, text)

    conversation.ask(question)
    answer = Reply()
    receive_answer(client, conversation, answer, show)
    if answer.reasoning and reasoning and not to_terminal:
        aside.note("")
    if answer.content:
        sys.stdout.write("\n")
    for call in answer.calls:
        aside.call(call)
    return 0


def _talk(client: httpx.Client, conversation: Conversation, *, reasoning: bool) -> int:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from rich.console import Console

    from divisi.deploy.cli.chat.screen import Screen
    from divisi.deploy.cli.chat.session import COMMANDS, HINT, Session

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    prompt: PromptSession[str] = PromptSession(
        key_bindings=keys,
        history=InMemoryHistory(),
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
    )
    screen = Screen(Console(), time.monotonic, reasoning=reasoning)
    screen.note(f"{conversation.model} at {str(client.base_url).rstrip('/')}. {HINT}.")
    Session(client, conversation, screen, prompt.prompt).run()
    return 0
