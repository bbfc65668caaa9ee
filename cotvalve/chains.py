"""MixChain that is there already: a run folder of `mix`, a file, or one of the authors' sets on the hub.

Sets from elsewhere may hold questions that results are reported on; those are recognised by their words and left out.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotvalve.answers import boxes, visible
from cotvalve.card import BASE_SHA256, DIRECTION_SHA256
from cotvalve.errors import DataError, SettingError
from cotvalve.problems import NAMES, training
from cotvalve.problems.dataset import hub_rows
from cotvalve.problems.unseen import origin
from cotvalve.prompts import prompt
from cotvalve.records import Json, RowStore, read_json, read_jsonl, read_parquet
from cotvalve.types import Chain, Judged, MixChain, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

JSON_LINES = (".jsonl", ".jsonl.gz")
"""How the names of JSON lines files end, which hold problems or chains."""


def load(source: str | Path, tokenizer: "PreTrainedTokenizerBase") -> list[MixChain]:
    """MixChain from a run folder of `mix`, a Parquet or JSON lines file, or a hub id of the authors' sets.

    Knows two forms: ours (a `chains` column) and the authors' (question, answer, solution_0..4, correct_k;
    solution_0 is the human one; LIMO's sets have one column, solution). A configuration stands behind the id and a colon. Chains marked as wrong are left out. So are, in sets from elsewhere, questions that
    must stay unseen; how many is logged as a warning. Raises DataError naming the row.
    """
    mix: list[MixChain] = []
    own = _own(source)
    unseen: Counter[str] = Counter()
    for number, row in _table(source):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  what a file holds
            raise DataError(f"{where} is {type(row).__name__}, not an object with columns")
        try:
            answer = _answer(row)
            question = str(row.get("question") or row["problem"])
        except KeyError as error:
            raise DataError(f"{where} has no column {error}; MixChain needs question, answer and chains or solution_k") from None
        if not own and (where_from := origin(question)):
            unseen[where_from] += 1
            continue
        if row.get("chains") is not None:
            if not isinstance(row["chains"], list):
                raise DataError(f"{where}: chains is {row['chains']!r}, expected a list of objects with text and tokens")
            chains = [_chain(c, where) for c in row["chains"]]
        elif isinstance(row.get("solution"), str):
            chains = [Chain(row["solution"], _length(tokenizer, row["solution"]), solution=0)]
        else:
            columns = sorted(int(k.removeprefix("solution_")) for k in row if k.startswith("solution_") and k[9:].isdigit())
            if not columns:
                raise DataError(f"{where} has neither 'chains' nor 'solution_0', 'solution_1', ...")
            if wrong := [k for k in columns if not isinstance(row[f"solution_{k}"], str | None)]:
                raise DataError(f"{where}: solution_{wrong[0]} is {row[f'solution_{wrong[0]}']!r}, expected text")
            chains = [
                Chain(text, _length(tokenizer, text), solution=k)
                for k in columns
                if (text := row[f"solution_{k}"]) and row.get(f"correct_{k}") not in (False, 0, "False", "false")
            ]
            # The authors' answer column may hold the whole human solution with "####" before the number.
            answer = str(row.get("target") or answer).rpartition("####")[2].strip()
        chains.sort(key=lambda chain: -chain.tokens)
        id = number if row.get("id") in (None, "") else row["id"]  # a data frame's first row is 0
        mix.append(MixChain(Problem(str(id), question, answer, row.get("kind") or "number"), tuple(chains)))
    if unseen:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(unseen.items()))
        said = f"{source}: {unseen.total()} of {unseen.total() + len(mix)} questions are in a test set or held out ({counts})"
        if not mix:
            raise DataError(f"{said}, so none is left to learn from; name training questions")
        _log.warning("%s: they were left out", said)
    if not any(m.chains for m in mix):
        raise DataError(f"{source}: no right chain in it")
    return mix


def judged(folder: str | Path, data_dir: str | None = None) -> tuple[list[tuple[Problem, list[Judged]]], Json]:
    """Every chain that a finished run of `mix` sampled, right or not, by question; and what its run.json says.

    A truncated chain is not right, whatever it says, nor is one without the box that its prompt asked for: a direction that
    is paid for those learns to leave it out. Chains of a run without a direction are those of a direction that is still
    zero, at alpha 1. Raises DataError for anything but such a folder.
    """
    path = Path(folder)
    if not _own(path) or not (path / "mix.json").exists():
        raise DataError(f"{folder}: not a finished run folder of `cotvalve mix`, whose wrong chains are needed as well as the right ones")
    made = read_json(path / "run.json")
    how = made["settings"]
    asked = training(how["data"], data_dir=data_dir, limit=how["limit"], seed=how["seed"], offset=how.get("offset", 0))
    known = {problem.id: problem for problem in asked}
    boxed = "\\boxed" in prompt(how["prompt"]).user
    found: dict[str, list[Judged]] = {name: [] for name in known}
    elsewhere = 0
    with closing(RowStore(path / "rows.sqlite")) as store:
        for row in store.rows():
            if row["problem"] not in known:
                raise DataError(f"{folder}: has chains of '{row['problem']}', which is not among the questions of {how['data']} now; put the data back as it was")
            if row["finish"] != "error":
                chain = Chain(row["text"], row["tokens"], row["alpha"] if how["direction"] else 1.0)
                cut = row["finish"] == "length"  # grading takes an answer that stood before the cut
                right = row["correct"] and not cut
                if right and boxed and not boxes(visible(row["text"])):
                    right, elsewhere = False, elsewhere + 1
                found[row["problem"]].append(Judged(chain, right, cut))
    if elsewhere and not any(one.right for chains in found.values() for one in chains):
        raise DataError(f"{folder}: all {elsewhere} right answers stand outside of the box that the prompt '{how['prompt']}' asks for, and count as wrong; ask with --prompt plain")
    return [(known[name], chains) for name, chains in found.items()], made


def check_own(folder: str, made: Json, ask: str, template: str | None, direction: str, facts: Mapping[str, str]) -> None:
    """Refuses chains that are no sample of the model that is about to learn from them: a policy gradient is wrong on those.

    `made` is the run.json beside the chains; `ask` and `template` are the training's prompt and chat template, `facts`
    those of its valve, with the base's sha256 (none for a quantized one) and the direction's (none for a new one).
    """
    how = made["settings"]
    was, now = made["facts"].get(BASE_SHA256), facts.get(BASE_SHA256)
    if was and now and was != now:
        raise SettingError(f"{folder}: chains of another model ({how['model']}, {was[:12]}) than the one that learns ({now[:12]})")
    if how.get("chat_template") != template:
        raise SettingError(f"{folder}: asked with the chat template {how.get('chat_template')}, training would ask with {template}")
    if how["temperature"] != 1 or how["top_p"] != 1:
        raise SettingError(f"{folder}: sampled at temperature {how['temperature']:g}, top_p {how['top_p']:g}; reward needs both at 1")
    if how["prompt"] != ask:
        raise SettingError(f"{folder}: asked with the prompt '{how['prompt']}', training would ask with '{ask}'; give --prompt {how['prompt']}")
    if made["facts"].get(DIRECTION_SHA256) != (facts.get(DIRECTION_SHA256) if direction else None):
        raise SettingError(
            f"{folder}: chains of another direction ({how['direction'] or 'none'}) than the one that learns ({direction or 'a new one'}); "
            "reward goes on from the direction that was sampled"
        )


def _answer(row: Json) -> str:
    """The answer column, or (LIMO's sets have none) the last box of the only solution."""
    if "answer" not in row and isinstance(row.get("solution"), str) and (found := boxes(row["solution"])):
        return found[-1]
    return str(row["answer"])


def _chain(fields: Any, where: str) -> Chain:
    try:
        return Chain("" + fields["text"], int(fields["tokens"]), fields.get("alpha"), fields.get("solution"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{where}: a chain is {str(fields)[:60]!r}, expected an object with text and tokens (a number)") from None


def _length(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _table(source: str | Path) -> Iterator[tuple[int, Json]]:
    path = Path(source)
    if path.is_dir() and (path / "mixchain.parquet").exists():
        path = path / "mixchain.parquet"
    if path.name.endswith(JSON_LINES):
        yield from read_jsonl(path)
        return
    if path.suffix == ".json":
        rows: Any = read_json(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows")
        yield from enumerate(rows, 1)
        return
    if path.suffix == ".parquet":
        yield from enumerate(read_parquet(path), 1)
        return
    if path.exists():
        raise DataError(f"{path}: expected a run folder of `mix` or a .parquet, .jsonl or .json file")
    if str(source).count("/") != 1:
        raise DataError(f"{source}: no such file or folder")
    name, _, config = str(source).partition(":")
    for row in hub_rows(name, config or None, "train", None, "name a file of it as --data (.parquet, .jsonl or .json)"):
        yield row.number, row.values


def _own(source: str | Path) -> bool:
    """True for a run folder of `mix`, which samples training questions only."""
    record = Path(source) / "run.json"
    return record.exists() and read_json(record).get("verb") == "mix"


def is_mixchain(data: str) -> bool:
    """True when `data` names MixChain (a run folder, a file with chains, a hub id), not a data set of problems."""
    if data in NAMES:
        return False
    if data.endswith(JSON_LINES) and Path(data).exists():
        _, first = next(read_jsonl(Path(data)))
        limo = "answer" not in first and isinstance(first.get("solution"), str)
        return limo or "chains" in first or any(name.startswith("solution_") and name[9:].isdigit() for name in first)
    return not data.endswith(".jsonl.gz")
