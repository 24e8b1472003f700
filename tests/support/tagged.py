"""Texts with their tags, as an answer's tokens would bring them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from divisi.model.text.tags import TAGS, Segment, Tag

_TAGS = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")


def tagged(text: str) -> list[Segment]:
    """A text in which the letters of every tag are the tag itself."""
    parts = _TAGS.split(text)
    segments = [Tag(part, part) if index % 2 else part for index, part in enumerate(parts)]
    return [segment for segment in segments if segment]


def pieces(segments: Sequence[Segment], places: Sequence[int]) -> list[Segment]:
    """The segments with their texts cut at `places`, counted in characters of all texts together."""
    cut: list[Segment] = []
    start = 0
    for segment in segments:
        if isinstance(segment, Tag):
            cut.append(segment)
            continue
        inner = [place - start for place in sorted(places) if start < place < start + len(segment)]
        cut += [segment[a:b] for a, b in zip([0, *inner], [*inner, len(segment)], strict=True)]
        start += len(segment)
    return cut
