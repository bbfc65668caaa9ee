r"""Answer to value: a Fraction, a ratio, a time of day, several numbers or a phrase.

Reading is exact and never evaluates an expression: "2^10", "5x" or "3 hours 20 minutes" are no number here.
Nothing can hang or bloat: patterns are possessive, answers and numbers have a greatest length.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


class Unreadable(ValueError):
    """An answer that cannot be read as a value of its kind; the message is the reason of the grade."""


MAX_ANSWER = 2_000
"""Characters of an answer that is looked at at all; the longest gold answer of any set has 160."""
MAX_DIGITS = 400
"""Digits of a number, and the largest exponent in scientific notation."""

_INTEGER = r"(?:\d{1,3}+(?:,\d{3})++(?!\d)|\d++)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d++)?+|\.\d++)"
_TIMES = r"(?:\\times|\\cdot|\u00d7|\u00b7|\*|x)"
_PART = rf"(?:\{{\s*+-?{_DECIMAL}\s*+\}}|\d)"
NUMBER = re.compile(
    rf"""(?<![\w^.]) (?<!\^\{{) (?<!\d:) (?<!\d,)
    (?:(?<![)\]}}])-)?+
    (?:
      (?:\d++\s*+)? \\frac\s*+{_PART}\s*+{_PART}
    | \d++[ ]++\d++\s*+/\s*+\d++
    | {_DECIMAL}\s*+/\s*+{_DECIMAL}
    | {_DECIMAL}(?:[eE][+-]?+\d++(?!\w) | \s*+{_TIMES}\s*+10\s*+\^\s*+(?:\{{\s*+[+-]?+\d++\s*+\}}|[+-]?+\d++))
    | {_DECIMAL}
    ) (?!\d) (?!\s*+\^) (?!:\d)""",
    re.VERBOSE,
)
SCALE = re.compile(r"\s?%|\s{0,3}(?:hundred|thousand|million|billion)\b", re.IGNORECASE)
_SCALES = {"%": Fraction(1, 100)} | {
    word: Fraction(10) ** zeros for word, zeros in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9))
}
_UNIT = re.compile(r"\\(?:text|textnormal|mbox|textrm|mathrm)\s?\{[^{}]{0,200}\}(?:\^\{?[23]\}?)?")
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-") | {"\u2019": "'", "\u2018": "'"})
_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"\{([,:])\}", r"\1"),
        # Before \text loses its braces: 18^{\text{th}}, 18^\text{th}.
        (r"(?<=\d)\^\{?\s?\\(?:text|textrm|mathrm|rm)\s?\{\s?(?:th|st|nd|rd)\s?\}\}?", ""),
        (r",\\!\s{0,9}", ","),
        (r"(?<=\d)(?:[\u2009\u200a\u202f\u00a0]|\\[,;:!])(?=\d{3}(?!\d))", ""),
        (r"[\u2000-\u200a\u202f\u00a0~]", " "),
        (r"[*`]{2,}|(?<=\d)\\[!](?=\d)", ""),
        (r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname)\s?\{([^{}]{0,200})\}", r" \1 "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degrees?(?![a-zA-Z])|°", " "),
        (r"(?<=\d)\^?\{?(?:th|st|nd|rd)\}?(?![a-zA-Z])", ""),
        (r"(?<=\d)\s{0,3}([ap])\.\s?m\b\.?", r" \1m"),
        (r"\\?[$€£¥₹₩¢]|\\[,;:!()\[\] ]|\\quad|\\q?quad", " "),
        (r"\\%", "%"),
        (r"^\s{0,9}-\s{1,9}(?=[\d.\\])", "-"),
        (r"-\s?\(\s?([\d./]{1,40})\s?\)", r"-\1"),
    )
)
_UNIT_LETTERS = frozenset("amgshlLJNWVKCF")
"""Single letters that may stand beside a number: 'a' and the common units. 5x, 2n and 3i are not numbers."""
_WORDS = re.compile(r"(?:(?![⁰¹²³⁴-⁹])[^\W\d_])++")
_LEFTOVER = re.compile(rf"(?:{_WORDS.pattern}\s?(?:\^\{{?[23]\}}?|[²³])?|[\s%().,;:'\"?/&\-²³])*+")
_CHARACTERS = "\u2e80"
"""From here on scripts write a word with one sign: 42个 is a number with its unit."""


_DIFFERENCE = re.compile(r"(?<![A-Za-z])[A-Za-z]\s*+-\s*+$"), re.compile(r"\s++-\s++[A-Za-z](?![A-Za-z])")
"""A letter less the number, or the number less a letter: 'L - 8' is no 8 litres."""
_FULL_HOUR = re.compile(r"(\d{1,2}):00\s*+(?:[ap]\.?\s?m|o'clock)", re.IGNORECASE)
"""A time of day that is a number too: "2:00 pm" is 2, where "2:20 pm" is none."""


_GROUPS = re.compile(r"[-$\s]*\d{1,3}(?:[ ~]\d{3})++(?:\.\d++)?[%A-Za-z\s]*")
"""Nothing but a number whose thousands stand apart: "9 500". In a sentence that may be two numbers ("2 500 ml bottles")."""


_POWER = re.compile(r"(?<=\d)[⁰¹²³⁴-⁹⁺⁻]++")
_FRACTION = re.compile(r"(?P<whole>(?<=\d)\s?)?[¼½¾⅐-⅞]")


def plain_digits(text: str) -> str:
    """`text` with its raised digits and one-sign fractions written out: '5²' is no 5, and '2½' no 2.

    >>> plain_digits("2½ of 5², -½ m²")
    '2 1/2 of 5^{2}, -1/2 m²'
    """
    text = _POWER.sub(lambda raised: f"^{{{unicodedata.normalize('NFKC', raised[0])}}}", text)
    return _FRACTION.sub(
        lambda sign: ("" if sign["whole"] is None else " ") + unicodedata.normalize("NFKC", sign[0].strip()).replace("\u2044", "/"), text
    )


def clean(text: str) -> str:
    """`text` with the typography of LaTeX, Markdown and Unicode taken away from its numbers."""
    text = plain_digits(text).translate(_MINUS)
    for pattern, into in _CLEANING:
        text = pattern.sub(into, text)
    return text


def exact(token: str) -> Fraction:
    """The value of one match of NUMBER."""
    token = token.replace(",", "")
    if sum(map(str.isdigit, token)) > MAX_DIGITS:
        raise Unreadable(f"number of more than {MAX_DIGITS} digits")
    negative = token.startswith("-")
    token = token.removeprefix("-").strip()
    power = re.fullmatch(rf"([\d.]+)(?:[eE]|\s*{_TIMES}\s*10\s*\^)\s*\{{?\s*([+-]?\d+)\s*\}}?", token)
    if power:
        exponent = int(power[2])
        if abs(exponent) > MAX_DIGITS:
            raise Unreadable(f"number of more than {MAX_DIGITS} digits")
        value = Fraction(power[1]) * Fraction(10) ** exponent
    elif "frac" in token:
        whole, rest = token.split("\\frac")
        over, under = re.findall(r"\{\s*(-?[\d.]+)\s*\}|(\d)", rest)
        value = Fraction(whole.strip() or 0) + _divide(over[0] or over[1], under[0] or under[1])
    elif "/" in token:
        over, under = token.split("/")
        *whole, over = over.split()
        value = Fraction(whole[0] if whole else 0) + _divide(over, under.strip())
    else:
        value = Fraction(token)
    return -value if negative else value


def _divide(over: str, under: str) -> Fraction:
    divisor = Fraction(under)
    if divisor == 0:
        raise Unreadable("division by zero")
    return Fraction(over) / divisor


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written, and what the word or sign behind it multiplies it with."""

    value: Fraction
    scale: Fraction = Fraction(1)
    """1/100 for a percent sign, 1,000,000 for 'million'."""


def number(text: str, *, units: bool = True) -> Number:
    r"""The one number that `text` is; Unreadable when it is anything else.

    With `units`, words and 'x =' may stand around it ("about 18 dollars"); without, only what LaTeX marks as text.

    >>> str(number(r"\$1{,}080.50 \text{ per year}").value), str(number("1 1/2").value), str(number("x = -3").value), str(number("9 500").value)
    ('2161/2', '3/2', '-3', '9500')
    """
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"answer of more than {MAX_ANSWER} characters")
    if not units:
        text = _UNIT.sub(lambda unit: " " if (scale := SCALE.search(unit[0])) is None else scale[0], text)
    plain = clean(text).strip().rstrip(".").strip()
    if units and (hour := _FULL_HOUR.fullmatch(plain)):
        return Number(Fraction(hour[1]))
    # The exact value stands before the sign: what is behind it is read where nothing else is a number.
    plain = next((part for part in re.split(r"\\approx|≈", plain) if NUMBER.search(part)), plain)
    if "=" in plain and units:
        plain = plain.rsplit("=", 1)[1]
    plain = re.sub(r"^\s*\+\s*(?=[\d.\\])", "", plain)
    if _GROUPS.fullmatch(plain):
        plain = re.sub(r"(?<=\d)[ ~](?=\d)", "", plain)
    found = list(NUMBER.finditer(plain))
    if len(found) != 1:
        raise Unreadable("no number in it" if not found else "more than one number in it")
    before, behind = plain[: found[0].start()], plain[found[0].end() :]
    rest = f"{before} {behind}"
    words = _WORDS.findall(rest)
    strange = bool(_DIFFERENCE[0].search(before) or _DIFFERENCE[1].match(behind))
    strange = strange or not _LEFTOVER.fullmatch(rest) or "π" in rest
    strange = strange or any(len(word) == 1 and word not in _UNIT_LETTERS and word < _CHARACTERS for word in words)
    if strange or (not units and words and not re.fullmatch(r"\s+[a-z]{4,}[\sa-z]*", rest)):
        raise Unreadable("not a plain number")
    scale = SCALE.match(plain, found[0].end())
    return Number(exact(found[0][0]), _SCALES[scale[0].strip().lower()] if scale else Fraction(1))


def same_number(gold: Number, given: Number) -> bool:
    """Exact equality. A scale that one side alone has may be meant or not (50% equals both 50 and 1/2, for
    questions differ in what they ask for); where both have one it counts."""
    if gold.scale != 1 and given.scale != 1:
        return gold.value * gold.scale == given.value * given.scale
    readings = [{side.value, side.value * side.scale} for side in (gold, given)]
    return bool(readings[0] & readings[1])


RATIO = re.compile(r"(?<![\w.:])\d++(?:\.\d++)?+(?:\s?(?::|\\colon|\bto\b)\s?\d++(?:\.\d++)?+)++(?![\w:])")
TIME = re.compile(
    r"(?<![\d:])(\d{1,2}):(\d\d)(?::(\d\d))?(?!:?\d)\s{0,3}([ap]\.?\s?m\b)?"
    r"|(?<![\d:.])(\d{1,2})\s{0,3}([ap]\.?\s?m\b)",
    re.IGNORECASE,
)
"""A time of day as in '3:30 p.m.', '14:55', '6:01:00' or '6 pm'."""
_CONNECTIVES = frozenset(
    [
        "the",
        "a",
        "an",
        "so",
        "therefore",
        "thus",
        "hence",
        "it",
        "its",
        "it's",
        "is",
        "was",
        "that",
        "and",
        "finally",
        "answer",
    ]
)
_ORDINALS = dict(
    zip(
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"],
        map(str, range(1, 11)),
        strict=True,
    )
)


def ratio(text: str) -> tuple[Fraction, ...]:
    """The terms of 'a:b', 'a to b' or 'a/b', divided by the last one: 15:18 equals 5:6."""
    plain = clean(text[:MAX_ANSWER])
    found = list(RATIO.finditer(plain))
    if len(found) == 1:
        terms = [exact(term) for term in re.findall(r"[\d.]+", found[0][0])]
    else:
        terms = [number(text).value, Fraction(1)]
    if terms[-1] == 0:
        raise Unreadable("division by zero")
    return tuple(term / terms[-1] for term in terms)


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day as written."""

    hour: int
    minute: int
    second: int
    half: str
    """'a' or 'p' when written or when the hour says so; empty when it may be either."""


def clock(text: str) -> Clock:
    """The first time of day in `text`."""
    match = TIME.search(clean(text[:MAX_ANSWER]))
    if not match:
        raise Unreadable("no time in it")
    hour, minute, second = int(match[1] or match[5]), int(match[2] or 0), int(match[3] or 0)
    half = (match[4] or match[6] or "")[:1].lower()
    if not half and not 1 <= hour <= 12:
        half = "p" if hour > 12 else "a"
    return Clock(hour % 12, minute, second, half)


def same_clock(gold: Clock, given: Clock) -> bool:
    """Equal to the second; a time without a.m. or p.m. equals either."""
    times = [(time.hour, time.minute, time.second) for time in (gold, given)]
    return times[0] == times[1] and (gold.half == given.half or not gold.half or not given.half)


def several(text: str) -> list[Counter[Fraction]]:
    """The numbers in `text` in any order, once for each way its commas can be read ('148,296')."""
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"answer of more than {MAX_ANSWER} characters")
    readings: list[Counter[Fraction]] = []
    for plain in (clean(text), clean(text.replace(",", ", "))):
        if "=" in plain:
            plain = ", ".join(re.split(r"[,;&]|\band\b", side)[0] for side in plain.split("=")[1:])
        readings.append(Counter(exact(match[0]) for match in NUMBER.finditer(plain)))
    if not readings[0]:
        raise Unreadable("no number in it")
    return readings


def phrase(text: str) -> list[str]:
    """Words of an answer: case, articles, joining words at its head, and ordinal endings do not matter."""
    words = [str(_ORDINALS.get(word, word)) for word in re.findall(r"[\w']+", clean(text[:MAX_ANSWER]).casefold())]
    while len(words) > 1 and words[0] in _CONNECTIVES:
        words = words[1:]
    return words


def same_phrase(gold: list[str], given: list[str]) -> bool:
    """True when the answer begins with the gold phrase, or when both say that things are equal."""
    if "equal" in gold:
        return bool({"equal", "same", "equally"} & set(given)) and "not" not in given
    # "Hamburgers" where one is meant is the same food.
    return bool(gold) and (given[: len(gold)] == gold or given[: len(gold)] == [*gold[:-1], gold[-1] + "s"])
