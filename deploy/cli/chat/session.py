"""The loop of an interactive chat: a line in, a command or an answer out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import httpx

from divisi.deploy.cli.chat.conversation import Conversation, ParameterError, Reply
from divisi.deploy.cli.chat.screen import Screen
from divisi.deploy.cli.remote import RemoteError, served_models, stream_events

PATH = "/chat/completions"
COMMANDS = {
    "/help": "what can be typed here",
    "/reset": "forget the conversation; system message and parameters stay",
    "/system": "/system TEXT sets the system message and forgets the conversation; alone it removes it",
    "/model": "/model NAME changes the model; alone it lists what the server has",
    "/params": "/params temperature=0.2 max_tokens=200 sets fields of every request, NAME= unsets; alone it shows them",
    "/quit": "leave (or Ctrl-D); Alt-Enter begins a new line, Ctrl-C stops an answer",
}
HINT = "/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves"


class Session:
    """One person's chat. `read` returns a line for a prompt; EOFError is the end, KeyboardInterrupt is Ctrl-C."""

    def __init__(
        self, client: httpx.Client, conversation: Conversation, screen: Screen, read: Callable[[str], str]
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._screen = screen
        self._read = read

    def run(self) -> None:
        """Read and answer until the person leaves."""
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue  # clears the line, as in a shell
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _turn(self, text: str) -> None:
        """One question, its answer and its tools' results; a turn that fails leaves nothing in the conversation."""
        kept = len(self._conversation.messages)
        self._conversation.ask(text)
        try:
            while (answer := self._answer()).calls and self._results(answer):
                pass
        except RemoteError as error:
            self._screen.error(str(error))
            del self._conversation.messages[kept:]
        except (KeyboardInterrupt, EOFError):
            self._screen.note("[stopped; this turn is forgotten]")
            del self._conversation.messages[kept:]

    def _answer(self) -> Reply:
        """Stream one answer. Stopped by Ctrl-C, what was shown is kept; with nothing shown the turn is void."""
        answer, stopped = Reply(), False
        self._screen.begin()
        try:
            receive_answer(self._client, self._conversation, answer, self._screen.show)
        except KeyboardInterrupt:
            if not answer.content:
                raise
            stopped = True
            answer.calls.clear()  # perhaps only half there
        self._screen.end(answer, stopped=stopped)
        self._conversation.messages.append(answer.message())
        return answer

    def _results(self, answer: Reply) -> bool:
        """Ask the person, who plays the tools, for the results."""
        for call in answer.calls:
            self._conversation.give(call, self._read(f"result of {call.name}> "))
        return True

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                for command, text in COMMANDS.items():
                    self._screen.note(f"{command:8} {text}")
            case "/reset":
                self._conversation.messages.clear()
                self._screen.note("the conversation is forgotten")
            case "/system":
                self._conversation.system = rest or None
                self._conversation.messages.clear()
                self._screen.note("new conversation " + ("with this system message" if rest else "without one"))
            case "/model":
                self._model(rest)
            case "/params":
                self._params(rest)
            case _:
                self._screen.error(f"{name} is no command; /help lists them")

    def _model(self, name: str) -> None:
        try:
            names = served_models(self._client)
        except RemoteError as error:
            self._screen.error(str(error))
            return
        if not name:
            self._screen.note("the server has: " + ", ".join(names))
        elif name in names:
            self._conversation.model = name
            self._screen.note(f"now talking to {name}")
        else:
            self._screen.error(f"the server has no {name}; it has: {', '.join(names)}")

    def _params(self, assignments: str) -> None:
        try:
            for assignment in assignments.split():
                self._conversation.set(assignment)
        except ParameterError as error:
            self._screen.error(str(error))
            return
        self._screen.parameters(self._conversation)


def receive_answer(
    client: httpx.Client, conversation: Conversation, answer: Reply, show: Callable[[str, str], None]
) -> None:
    """Stream one answer into `answer`, showing each piece. Raises RemoteError."""
    with closing(stream_events(client, PATH, conversation.body())) as events:
        for event in events:
            for part, text in answer.add(event):
                show(part, text)
