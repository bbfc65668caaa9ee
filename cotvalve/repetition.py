"""Chains that go round in circles, found in their text.

A chain loops when the same stretch of words stands in it several times in a row, to its end or not. Texts that
only repeat themselves with changes (counting up, one more check) are not loops; where they never end, the
token budget cuts them and they count as truncated.
"""

import re

import numpy as np

COPIES = 4
"""So often in a row the same stretch has to stand."""
FEWEST = 60
"""Words that the copies have to fill: 2 + 2 + ... + 2 = 40, a table's rules and a chorus stay below it."""
LONGEST_PERIOD = 250
"""Words of the longest stretch that is looked for."""
LONGEST_WORD = 200
"""Characters of one 'word' beyond which it is a loop itself: 3333..., !!!!..., \\quad\\quad..."""

# A run of one sign is one word (a table's rule), and scripts without spaces count by the character.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|([^\w\s])\1*"
)


def loops(text: str) -> bool:
    """True when a stretch of words stands in `text` four times in a row or more, 60 words of it at least.

    >>> loops("Wait, let me check again. " * 12), loops("2 + " * 20 + "2 = 42. So she has 42 apples.")
    (True, False)
    """
    words = [found.group() for found in _WORDS.finditer(text)]
    if any(len(word) > LONGEST_WORD for word in words):
        return True
    # Most texts end here. Copies that fill n words with a period of n / 4 or less have at least n - 3 - n / 4 runs of
    # four words that stood there before.
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    if len(runs) - len(set(runs)) < FEWEST - 3 - FEWEST // COPIES:
        return False
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(word, len(number)) for word in words], dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // COPIES) + 1):
        # Copies show as a run of places that equal the place one period before them.
        differs = np.flatnonzero(np.concatenate(([True], ids[period:] != ids[:-period], [True])))
        if int(np.diff(differs).max()) - 1 + period >= max(COPIES * period, FEWEST):
            return True
    return False
