"""What is on disk: JSON files written whole or not at all, rows that survive kill -9, run folders.

A run folder holds `run.json` (verb, settings, seed, versions, hardware, data hashes), `rows.sqlite` (one
row per finished unit of work, written as it finishes) and whatever the verb makes of the rows at its end.
The same command on the same folder goes on where it stopped; a folder made by other settings is refused.
sqlite is in WAL mode: a killed process loses at most the row it was writing, never one it had finished.
"""

import errno
import fcntl
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sqlite3
import tempfile
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cotvalve.errors import DataError

Json = dict[str, Any]
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""How a path that is no file is told, also where a part of it is one."""

_UMASK = os.umask(0)
os.umask(_UMASK)


def share(handle: int) -> None:
    """Gives a file made by mkstemp, which only its owner can read, the permissions of any new file."""
    os.fchmod(handle, 0o666 & ~_UMASK)


FULL = ("iostream error", "inline_container", "PytorchStreamWriter", "No space left", "File too large", "quota exceeded")
"""How torch's and safetensors' own errors speak of a full disk."""


@contextmanager
def disk(path: Path) -> Generator[None]:
    """Turns 'no space left', in the words of the file system, sqlite, torch or safetensors, into one line about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(f"{path}: the disk is full; free some space and run the same command again") from error
    except sqlite3.OperationalError as error:
        if "readonly" in str(error) or "unable to open" in str(error):
            raise DataError(f"{path}: cannot be read or written ({error}); mend its permissions, or name another path") from error
        if "full" not in str(error) and "disk I/O" not in str(error):
            raise
        raise DataError(f"{path}: the disk is full ({error}); free some space and run the same command again") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # a doubled key is a bug of ours
            raise
        raise DataError(f"{path}: damaged ({error}); put a whole copy back, or remove the folder and begin anew") from error
    except (RuntimeError, SafetensorError) as error:
        if not any(words in str(error) for words in FULL):
            raise
        raise DataError(f"{path}: the disk is full; free some space and run the same command again") from error


@contextmanager
def whole_files(folder: Path) -> Generator[Path]:
    """A folder for files that others write, which move into `folder` at the end: each is there whole or not at all."""
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    with disk(folder):
        part.mkdir(parents=True)
        yield part
        for path in sorted(part.iterdir()):
            os.replace(path, folder / path.name)
        part.rmdir()


def write_text(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with disk(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            share(handle)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except NOT_THERE:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and brackets in thousands
        raise DataError(f"{path}: not readable as JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, Json]]:
    """Yields (row number from 1, object) of a JSON lines file, unpacked where its name ends in .gz; blank lines are passed over.

    Raises DataError with the row number for a line that is not a JSON object, and for a file without rows.
    """
    rows = number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # Editors on Windows begin a file with a byte order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}: row {number} is not JSON ({error.msg} at column {error.colno})") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands
                    raise DataError(f"{path}: row {number} cannot be read ({str(error).partition(';')[0]})") from None
                if b"\\ud" in line.lower() and (half := _half_a_character(value)):
                    raise DataError(f"{path}: row {number} holds {half}, half of a character: no text can hold it; mend or remove it")
                if not isinstance(value, dict):
                    raise DataError(f"{path}: row {number} is {type(value).__name__}, expected an object like {{\"question\": ...}}")
                rows += 1
                yield number, value
    except NOT_THERE:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} in row {number})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file of JSON lines ({error})") from None
    if not rows:
        raise DataError(f"{path}: no rows in it")


def _half_a_character(value: Any) -> str:
    r"""The first lone surrogate in a JSON value, as JSON writes it; empty where there is none.

    >>> _half_a_character(["\ud83d\ude00", "a\ud83d"])
    '\\ud83d'
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return json.dumps(error.object[error.start]).strip('"')
    return ""


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parquet(path: Path, rows: Iterable[Json], level: int | None = None) -> None:
    """Writes rows with the same keys as one Parquet file, whole or not at all; `level` is zstd's, 1 to 22."""
    import pyarrow
    import pyarrow.parquet

    part = path.with_name(f".{path.name}.part")
    with disk(path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part, compression="zstd", compression_level=level)
        os.replace(part, path)


def read_parquet(path: Path) -> list[Json]:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except NOT_THERE:
        raise DataError(f"{path}: no such file") from None
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not readable as Parquet ({error})") from None


class RowStore:
    """Finished rows by key, on disk the moment `add` returns. One writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk(path):
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")

    def add(self, key: str, row: Json) -> None:
        """Stores `row`; a key that is already there is a bug of the caller (finished rows never change)."""
        with disk(self.path):
            self._db.execute("INSERT INTO rows VALUES (?, ?)", (key, json.dumps(row, ensure_ascii=False)))

    def keys(self) -> set[str]:
        """Keys of all finished rows."""
        with disk(self.path):
            return {key for (key,) in self._db.execute("SELECT key FROM rows")}

    def rows(self, prefix: str = "") -> list[Json]:
        """All finished rows whose key starts with `prefix`, by key."""
        with disk(self.path):
            found = self._db.execute("SELECT value FROM rows WHERE substr(key, 1, ?) = ? ORDER BY key", (len(prefix), prefix)).fetchall()
        return [json.loads(value) for (value,) in found]

    def __len__(self) -> int:
        with disk(self.path):
            return self._db.execute("SELECT count(*) FROM rows").fetchone()[0]

    def close(self) -> None:
        """Folds the write-ahead log into the file and closes it."""
        self._db.close()


def alone(folder: Path) -> int:
    """Locks `folder`, made if need be, until the file handle that is returned is closed, by whoever kills the process too.

    Raises DataError where another process holds it. A file system that cannot lock folders (some NFS) is trusted.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise DataError(f"{folder}: another process is at work in it; wait until it is done, or name another --out") from None
    except OSError:
        pass
    return handle


def read_run(folder: Path) -> Json:
    """A run folder's run.json: its verb, settings and facts. Raises DataError for another program's file of that name."""
    found = read_json(folder / "run.json")
    if not isinstance(found, dict) or not {"verb", "settings", "facts"} <= found.keys():
        raise DataError(f"{folder}: not a run folder, its run.json is another program's; name another one")
    return found


class Run:
    """A run folder, opened to begin or to go on."""

    def __init__(self, folder: Path, verb: str, settings: Json, facts: Json | None = None) -> None:
        """Opens `folder`.

        `settings` are those that decide the rows: a folder made by others is refused with the first field
        that differs, and so is one whose data, base or direction (told by the hashes among the facts) changed under
        its name. The other `facts` (hardware) are written when the run begins.
        """
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: a file, not a folder; name another --out")
        self._release = weakref.finalize(self, os.close, alone(folder))
        try:
            self._open(folder / "run.json", verb, settings, facts or {})
            self.rows = RowStore(folder / "rows.sqlite")
        except BaseException:
            self._release()
            raise

    def _open(self, record: Path, verb: str, settings: Json, facts: Json) -> None:
        folder = self.folder
        for half in folder.glob(f".{record.name}.*"):  # of a process that was killed while it wrote the record
            half.unlink()
        found = read_run(folder) if record.exists() else {}
        if not found and any(folder.iterdir()):
            raise DataError(f"{folder}: not empty and not a run folder; name another --out")
        if found and _holds_work(folder):
            refuse_other(folder, found, verb, settings, facts)
            self.facts: Json = found["facts"]
        else:
            # A run that failed before its first row (a wrong setting, a full disk) does not keep its folder.
            self.facts = {**versions(), **facts}
            write_json(record, {"verb": verb, "settings": settings, "facts": self.facts})

    def note(self, facts: Mapping[str, str]) -> None:
        """Adds what is known only once the run goes on; where it went on otherwise than before, both are said."""
        for name, value in facts.items():
            said = str(self.facts.get(name, ""))
            if value not in said.split("; "):
                self.facts[name] = f"{said}; {value}" if said else value
                write_json(self.folder / "run.json", {**read_json(self.folder / "run.json"), "facts": self.facts})

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        with closing(self.rows):
            self._release()


def _holds_work(folder: Path) -> bool:
    rows = folder / "rows.sqlite"
    if any(path.name != "run.json" and not path.name.startswith(rows.name) for path in folder.iterdir()):
        return True
    if not rows.exists():
        return False
    with closing(RowStore(rows)) as store:
        return len(store) > 0


def refuse_other(folder: Path, found: Json, verb: str, settings: Json, facts: Json) -> None:
    """Raises DataError when `found` (a folder's run.json) is of another verb, other settings, data or weights."""
    if found["verb"] != verb:
        raise DataError(f"{folder}: holds a run of '{found['verb']}', not '{verb}'; name another --out")
    before = found["settings"]
    for name in sorted({*settings, *before}):
        if settings.get(name) != before.get(name):
            raise DataError(f"{folder}: holds a run with {name}={before.get(name)!r}, this one has {settings.get(name)!r}; name another --out, or the same settings to go on")
    for name, what in _HASHED.items():
        now, then = facts.get(name), found["facts"].get(name)
        if now is not None and then is not None and (_HASH.findall(now) or now) != (_HASH.findall(then) or then):
            raise DataError(f"{folder}: holds a run on another {what} of the same name ({then}; now {now}); name another --out, or put the {what} back as it was to go on")


_HASH = re.compile(r"\b[0-9a-f]{12,64}\b")
_HASHED = {"data": "data set", "base_sha256": "base model", "direction_sha256": "direction"}
"""Facts that hold a hash, and what each is of. The words around it may change: of a calibration they say what trained the direction."""


def versions() -> Json:
    """Versions of what decides a result: Python, cotvalve, torch, transformers, peft."""
    found: Json = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("cotvalve", "torch", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
