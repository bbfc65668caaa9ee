"""ASDiv: 2,305 elementary word problems with all kinds of answers (Miao et al., 2020).

Most golds are a number with its unit in brackets ("9 (apples)"); the rest are several numbers ("5; 15"),
ratios, times of day, fractions, ordinals, names. `kind_of` tells them apart. The problems whose gold is one
number are the subset "numeric". Never part of the package (CC BY-NC 4.0): fetched, or read from a folder.
"""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from cotvalve.errors import DataError
from cotvalve.problems.dataset import ENVIRONMENT, DataSet
from cotvalve.types import AnswerKind, Problem

COMMIT = "883f90a9a65bf00304ba8f37423910fe743abc47"
URL = f"https://raw.githubusercontent.com/chaochun/nlu-asdiv-dataset/{COMMIT}/dataset/ASDiv.xml"
SHA256 = "ef8904068482919ac48c8eeaaf6df344b8a308ba66d048c2d4d87eab82dc4929"

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\(?\d+/\d+\)?|(?:The )?\d+(?:st|nd|rd|th)(?: caller\.)?")


def kind_of(answer: str) -> AnswerKind:
    """How the gold `answer`, without its unit, is compared.

    >>> [kind_of(gold) for gold in ("9", "5; 15", "5:6", "3:30 p.m.", "5:45", "-(1/3)", "6th", "Rug B")]
    ['number', 'list', 'ratio', 'time', 'time', 'number', 'number', 'word']
    """
    if ";" in answer:
        return "list"
    if re.match(r"\d+:\d\d(?!\d)", answer):
        return "time"
    if re.fullmatch(r"\d+:\d+", answer):
        return "ratio"
    return "number" if _NUMBER.fullmatch(answer) else "word"


def problems(path: Path) -> list[Problem]:
    """The problems of the published XML file."""
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not readable as XML ({error})") from None
    found = [_problem(element, f"{path}: problem {number}") for number, element in enumerate(root.iter("Problem"), 1)]
    if not found:
        raise DataError(f"{path}: no problems in it")
    return found


def _problem(element: ElementTree.Element, where: str) -> Problem:
    texts = {
        name: " ".join((element.findtext(name) or "").split())
        for name in ("Body", "Question", "Answer", "Solution-Type")
    }
    for name in ("Question", "Answer"):
        if not texts[name]:
            raise DataError(f"{where}: no text in <{name}>")
    answer = re.sub(r" *\([^()]*[^()\d/][^()]*\)", "", texts["Answer"])  # "9 (apples)" is 9; "-(1/3)" stays
    kind = kind_of(answer)
    if texts["Solution-Type"] == "Ratio" and kind == "time":  # 22:15 students are no time of day
        kind = "ratio"
    return Problem(
        id=f"asdiv/{element.get('ID') or where}",
        question=f"{texts['Body']} {texts['Question']}".strip(),
        answer=answer,
        kind=kind,
        subset="numeric" if kind == "number" else "",
    )


def read(_split: str, folder: Path | None) -> list[Problem]:
    """The problems from `folder`/asdiv/ASDiv.xml, or from the pinned file of the authors' repository."""
    return problems(folder / "asdiv" / "ASDiv.xml" if folder else _fetched())


def _fetched() -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it tells every download on standard error
    try:
        return Path(
            pooch.retrieve(
                URL, f"sha256:{SHA256}", fname="ASDiv.xml", path=pooch.os_cache("cotvalve"), progressbar=False
            )
        )
    except (OSError, ValueError) as error:  # offline, or a file of another hash
        raise DataError(
            f"data set 'asdiv' could not be fetched from {URL} ({type(error).__name__}); go online once to download it, "
            f"or name a folder that holds asdiv/ASDiv.xml with --data-dir or {ENVIRONMENT}"
        ) from None


ASDIV = DataSet("asdiv", {"test": 2305}, "github: chaochun/nlu-asdiv-dataset", "CC BY-NC 4.0", read)
