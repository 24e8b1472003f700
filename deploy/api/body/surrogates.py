"""Halves of UTF-16 pairs in JSON text: they are no characters, and nothing past the JSON reader can spell them.

Clients send them where they cut a text in the middle of an emoji. Each becomes U+FFFD, as in a browser.
"""

from __future__ import annotations

import re

# The alternatives take whole pairs and other escapes first, so that what is left over is alone, and no escaped
# backslash is taken for the beginning of one.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<alone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def mend_surrogates(text: str) -> str:
    """JSON text with each escape of a lone surrogate replaced; all else stays as it is."""
    return _ESCAPE.sub(lambda found: r"\ufffd" if found["alone"] else found[0], text)
