"""Trace context as a header and as bytes."""

from __future__ import annotations

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.schemas import Schemas

from divisi.cluster.telemetry import conventions
from divisi.cluster.telemetry.context import pack, parse, spell, unpack

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_header_comes_back_as_it_was() -> None:
    found = parse(HEADER)
    assert found is not None
    assert spell(found) == HEADER
    assert found.trace_flags.sampled


def test_bytes_come_back_as_they_were() -> None:
    found = parse(HEADER)
    assert found is not None
    packed = pack(found)
    again = unpack(packed)
    assert len(packed) == 25
    assert again is not None
    assert spell(again) == HEADER


@pytest.mark.parametrize(
    "header", ["", "nonsense", HEADER[:-3], HEADER.replace("0af7", "zzzz"), f"00-{'0' * 32}-{'0' * 16}-01"]
)
def test_what_is_no_context_is_none(header: str) -> None:
    assert parse(header) is None


def test_bytes_of_another_length_are_none() -> None:
    assert unpack(b"") is unpack(b"x" * 24) is unpack(bytes(25)) is None


def test_the_names_are_those_of_the_revision() -> None:
    """The package of conventions that is installed knows each attribute that begins with gen_ai, and the revision."""
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    metrics = {
        conventions.SERVER_REQUEST_DURATION, conventions.SERVER_TIME_TO_FIRST_TOKEN,
        conventions.SERVER_TIME_PER_OUTPUT_TOKEN,
    }  # fmt: skip
    used = {v for v in vars(conventions).values() if isinstance(v, str) and v.startswith("gen_ai.")}
    assert used - known - metrics == set()
    assert conventions.SCHEMA_URL in {schema.value for schema in Schemas}
