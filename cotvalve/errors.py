"""The error policy, in one place.

Four errors, flat. Each message says what was given, what was expected and what to do, and names the
path, the row or the module. The command line prints the message as one line and exits with code 2;
anything that is not one of these four is a bug and keeps its traceback.

    SettingError       a value the user gave: a flag, a recipe field, an argument
    DataError          a file, a row, a run folder, a full disk
    DirectionMismatch  a direction that does not fit the model it is put on
    EngineError        a backend that cannot do what was asked, or failed while doing it

A bad *completion* is not an error: it is a row with a `Grade` and a reason. A bad *data row* is an error
when it is loaded, with its row number.
"""

import difflib
from collections.abc import Iterable


class CotvalveError(Exception):
    """Base of everything a user can cause and mend."""


class SettingError(CotvalveError):
    """A value the user gave cannot be used."""


class DataError(CotvalveError):
    """A file, a row or a run folder cannot be used."""


class DirectionMismatch(CotvalveError):
    """A direction does not fit the model."""


class EngineError(CotvalveError):
    """A backend cannot do what was asked."""


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: offers the nearest known one, then lists them all.

    >>> unknown("data set", "gsm8", ["gsm8k", "math500"])
    "unknown data set 'gsm8': did you mean 'gsm8k'? Known: gsm8k, math500"
    """
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown {what} '{given}': {hint}Known: {', '.join(names)}"
