"""The load generator and what it reads, against a server of the test's own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from divisi.benchmarks.served.answer import read_answer
from divisi.benchmarks.served.load import LoadGenerator, Stream

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(*events: str) -> bytes:
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


def text(said: str) -> str:
    return json.dumps({"choices": [{"text": said}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 3}})
END = b"0\r\n\r\n"


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_times_are_those_of_the_pieces_that_complete_an_event(cut: int) -> None:
    parts = [HEAD + chunk(text("")) + chunk(text("a")), chunk(text("b"), text("c")), chunk(USAGE, "[DONE]") + END]
    pieces = [(float(at), part[i : i + cut]) for at, part in enumerate(parts, 2) for i in range(0, len(part), cut)]
    answer = read_answer(1.0, pieces)
    assert (answer.first_s, answer.last_s, answer.longest_gap_s) == (1.0, 2.0, 1.0)
    assert (answer.text, answer.events, answer.tokens) == ("abc", 3, 3)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nlater", "429 Too Many later"),
        (HEAD + chunk(text("a")) + END, "breaks off after 1 events"),
        (HEAD + chunk(text("a"), '{"error": "gone"}', "[DONE]") + END, "gone"),
        (HEAD + chunk("[DONE]") + END, "breaks off after 0"),
    ],
)
def test_an_answer_that_does_not_end_well_is_no_answer(response: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_answer(0.0, [(1.0, response)])


@contextmanager
def server(response: bytes, connections: int) -> Iterator[str]:
    """Answers so many connections, in two pieces each."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        for _ in range(connections):
            with listener.accept()[0] as connection:
                asked = connection.recv(2**16)
                while not asked.endswith(b"}"):
                    asked += connection.recv(2**16)
                connection.sendall(response[:90])
                connection.sendall(response[90:])

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    finally:
        thread.join(10)
        listener.close()


def test_streams_ask_one_request_after_another_and_may_pause() -> None:
    long = "c" * 2**18  # more than one read takes
    response = HEAD + chunk(text("a"), text("b")) + chunk(text(long)) + chunk(USAGE, "[DONE]") + END
    with LoadGenerator() as load:
        with server(response, 3) as url:
            burst = load.run(url, [Stream([{}, {}]), Stream([{}], pause_s=0.2)])
        assert [[answer.text for answer in stream] for stream in burst.answers] == [["ab" + long] * 2, ["ab" + long]]
        assert burst.tokens == 9
        assert burst.seconds >= 0.2
        with server(b"HTTP/1.1 503 Busy\r\n\r\n", 1) as url, pytest.raises(SystemExit, match="503 Busy"):
            load.run(url, [Stream([{}])])
