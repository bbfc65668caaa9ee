"""Questions that nothing may be trained on, known by their words: the test sets and the held-out training questions.

A data set from elsewhere has other ids, so its questions are compared as text. `assets/unseen.json` holds the first
12 hex digits of each question's sha256, by set and split; the questions themselves are not in the package.
`benchmarks/unseen.py` writes the file from the data sets.
"""

import hashlib
import json
import unicodedata
from functools import cache
from importlib.resources import files

ASSET = "assets/unseen.json"
DIGITS = 12
"""Hex digits of each digest: 2^48 values, so that of 10,000 questions none is taken for one of 8,000 by chance."""


def key(question: str) -> str:
    """The digest of a question: case, spaces and punctuation do not count, digits and the signs of arithmetic do.

    >>> key("Tom has 3 apples.  How many?") == key("tom has 3 Apples, how many")
    True
    >>> key("What is 2+3?") == key("What is 2-3?")
    False
    """
    plain = unicodedata.normalize("NFKC", question).casefold().replace("\u2212", "-")
    kept = "".join(letter for letter in plain if letter.isalnum() or letter in "+-*/=<>^")
    return hashlib.sha256(kept.encode()).hexdigest()[:DIGITS]


def origin(question: str) -> str | None:
    """Where a question must stay unseen, for example 'gsm8k test' or 'gsm8k heldout'; None where it may be learned."""
    return _known().get(key(question))


@cache
def _known() -> dict[str, str]:
    found = json.loads((files("cotvalve") / ASSET).read_text(encoding="utf-8"))
    return {
        joined[at : at + DIGITS]: where for where, joined in found.items() for at in range(0, len(joined), DIGITS)
    }
