"""What is on disk: written whole or not at all, and still there after kill -9 and on a full disk."""

import contextlib
import errno
import gzip
import json
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

from cotvalve import records
from cotvalve.errors import DataError
from cotvalve.records import RowStore, Run, disk, read_json, read_jsonl, sha256, write_json, write_parquet, write_text


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: the write fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Whole or not at all


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    write_json(path, {"a": [1, 2], "é": "ü"})
    assert read_json(path) == {"a": [1, 2], "é": "ü"}
    assert "é" in path.read_text(encoding="utf-8")
    write_json(path, {})
    assert read_json(path) == {}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_file_that_cannot_be_written_keeps_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "before")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with small_disk(10_000), pytest.raises(DataError, match=r"a\.json: the disk is full; free some space") as failed:
        write_text(path, "x" * 20_000)
    assert "\n" not in str(failed.value)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "nothing half-written lies beside it"
    write_text(path, "x" * 20_000)
    assert len(path.read_text()) == 20_000


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    """Temporary files are made for their owner alone."""
    write_text(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~records._UMASK


def test_only_a_full_disk_is_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(PermissionError), disk(tmp_path):
        raise PermissionError(13, "denied")
    RowStore(tmp_path / "rows").close()
    with pytest.raises(DataError, match=r"cannot be read or written \(attempt to write a readonly database\)"), disk(tmp_path):
        sqlite3.connect(f"file:{tmp_path / 'rows'}?mode=ro", uri=True).execute("DELETE FROM rows")
    with pytest.raises(sqlite3.OperationalError, match="no such table"), disk(tmp_path):
        sqlite3.connect(":memory:").execute("SELECT * FROM rows")


# Reading


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n\n{"a": 2\n', "row 3 is not JSON"),
        ('{"a": 1}\n[1, 2]\n', "row 2 is list, expected an object"),
        ('{"a": 1}\n"text"\n', "row 2 is str"),
        ("", "no rows in it"),
        ("\n  \n", "no rows in it"),
        ('{"a": 1}\n{"a": ' + "7" * 5000 + "}\n", r"row 2 cannot be read \(Exceeds the limit \(4300 digits\) .* has 5000 digits\)$"),
        ("[" * 100_000 + "\n", "row 1 cannot be read .maximum recursion depth"),
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_json_lines_name_the_row(tmp_path: Path, name: str, text: str, says: str) -> None:
    """Gzipped ones were said to hold "a row" that is not JSON, also for a blank line between two."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(DataError, match=says) as failed:
        list(read_jsonl(path))
    assert str(path) in str(failed.value)


def test_json_lines_are_numbered_from_one_over_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_of_windows_are_read(tmp_path: Path, name: str) -> None:
    """The byte order mark was told as "row 1 is not JSON (Unexpected UTF-8 BOM (decode using utf-8-sig))"."""
    text = '\ufeff{"a": "\u00e9"}\r\n\r\n{"a": 2}\r\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert list(read_jsonl(tmp_path / name)) == [(1, {"a": "\u00e9"}), (3, {"a": 2})]
    (tmp_path / "rows.json").write_bytes('\ufeff[{"a": "\u00e9"}]\r\n'.encode())
    assert read_json(tmp_path / "rows.json") == [{"a": "\u00e9"}]


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"bytes: not UTF-8 text \(invalid start byte in row 1\)"):
        list(read_jsonl(tmp_path / "bytes"))
    with pytest.raises(DataError, match="bytes: not readable as JSON"):
        read_json(tmp_path / "bytes")
    for read in (read_json, lambda path: list(read_jsonl(path))):
        with pytest.raises(DataError, match="missing: no such file"):
            read(tmp_path / "missing")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.json: not readable as JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "cut.json").write_text('{"a": [1, ')
    with pytest.raises(DataError, match=r"cut\.json: not readable as JSON"):
        read_json(tmp_path / "cut.json")


def test_sha256_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Parquet


def test_parquet_round_trip(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None, "c": [{"x": 0.5}]}, {"a": 2, "b": "é", "c": []}]
    write_parquet(tmp_path / "a.parquet", rows)
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows


def test_parquet_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"a": 1}])
    big = [{"a": i, "text": os.urandom(200).hex()} for i in range(500)]
    with small_disk(20_000), pytest.raises(DataError, match="the disk is full"):
        write_parquet(path, big)
    assert pyarrow.parquet.read_table(path).to_pylist() == [{"a": 1}]
    write_parquet(path, big)
    assert pyarrow.parquet.read_table(path).to_pylist() == big
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


# Rows


def test_rows_are_kept_by_key_and_never_change(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows.sqlite")
    store.add("b|1", {"x": "é\n\u2028"})
    store.add("a|2", {"x": 1.5})
    store.add("a%", {"x": None})
    with pytest.raises(sqlite3.IntegrityError):
        store.add("b|1", {"x": "other"})
    assert store.keys() == {"b|1", "a|2", "a%"}
    assert store.rows() == [{"x": None}, {"x": 1.5}, {"x": "é\n\u2028"}]
    assert store.rows("a|") == [{"x": 1.5}]
    assert store.rows("a%") == [{"x": None}], "a prefix is text, not a pattern"
    assert len(store) == 3
    store.close()
    again = RowStore(tmp_path / "rows.sqlite")
    assert again.keys() == {"b|1", "a|2", "a%"}
    again.close()


WRITER = """
import sys
from pathlib import Path
from cotvalve.records import RowStore
store = RowStore(Path(sys.argv[1]))
at = len(store)
while True:
    store.add(f"{at:08d}", {"text": f"row {at} " * 50})
    print(at, flush=True)
    at += 1
"""


def test_a_row_that_was_added_survives_kill_9(tmp_path: Path) -> None:
    """Killed three times in full flight; every row whose `add` had returned is there, whole and once."""
    path = tmp_path / "rows.sqlite"
    last = -1
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(400):
            last = int(process.stdout.readline())
        process.kill()
        for line in process.stdout.read().splitlines(keepends=True):
            last = int(line) if line.endswith("\n") else last
        assert process.wait() == -signal.SIGKILL
    store = RowStore(path)
    rows = store.rows()
    assert last >= 1199
    assert len(rows) in (last + 1, last + 2)  # it may have died between adding a row and saying so
    assert rows == [{"text": f"row {i} " * 50} for i in range(len(rows))]
    store.close()


def test_a_full_disk_loses_no_row_and_the_store_goes_on(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows.sqlite")
    added = 0
    with small_disk(400_000), pytest.raises(DataError, match=r"rows\.sqlite: the disk is full.*same command") as failed:  # noqa: PT012
        for added in range(1000):
            store.add(f"{added:04d}", {"x": "y" * 1000})
    assert "\n" not in str(failed.value)
    assert 20 < added < 1000
    store.close()
    again = RowStore(tmp_path / "rows.sqlite")
    assert [len(row["x"]) for row in again.rows()] == [1000] * added
    for number in range(added, 300):
        again.add(f"{number:04d}", {"x": "z"})
    assert len(again) == 300
    again.close()


# Run folders


def test_a_run_goes_on_in_its_folder_and_keeps_its_first_facts(tmp_path: Path) -> None:
    with Run(tmp_path / "run", "mix", {"alphas": (0, 0.5)}, {"data": "d (abc)", "hardware": "here"}) as at:
        at.rows.add("1", {"a": 1})
    with Run(tmp_path / "run", "mix", {"alphas": (0, 0.5)}, {"data": "d (abc)", "hardware": "there"}) as at:
        assert at.rows.keys() == {"1"}
        assert at.facts["hardware"] == "here"
    found = read_json(tmp_path / "run" / "run.json")
    assert (found["verb"], found["settings"], found["facts"]["data"]) == ("mix", {"alphas": [0, 0.5]}, "d (abc)")
    assert {"python", "cotvalve", "torch", "transformers", "peft"} <= found["facts"].keys()


def test_a_run_says_what_it_learns_on_the_way_and_where_it_went_on_otherwise(tmp_path: Path) -> None:
    with Run(tmp_path / "r", "sweep", {"seed": 0}) as at:
        at.rows.add("a", {"n": 1})
        at.note({"engine": "vllm 1, dial"})
        at.note({"engine": "vllm 1, dial"})
    with Run(tmp_path / "r", "sweep", {"seed": 0}) as at:
        at.note({"engine": "transformers"})
        at.note({"engine": "vllm 1, dial"})
    found = read_json(tmp_path / "r" / "run.json")
    assert found["facts"] == at.facts
    assert (found["facts"]["engine"], found["settings"]) == ("vllm 1, dial; transformers", {"seed": 0})


@pytest.mark.parametrize(
    ("verb", "settings", "facts", "says"),
    [
        ("sweep", {"seed": 1, "limit": None}, {}, "holds a run of 'mix', not 'sweep'; name another --out"),
        ("mix", {"seed": 2, "limit": None}, {}, "holds a run with seed=1, this one has 2; name another --out"),
        ("mix", {"seed": 1, "limit": 5}, {}, "limit=None, this one has 5"),
        ("mix", {"seed": 1}, {}, None),
        ("mix", {"seed": 1, "limit": None, "added": 3}, {}, "added=None, this one has 3"),
        ("mix", {"seed": 1, "limit": None}, {"data": "gsm8k (2 questions, ffff)"}, "another data set of the same name .*0000.*ffff"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_not_touched(
    tmp_path: Path, verb: str, settings: dict[str, object], facts: dict[str, str], says: str | None
) -> None:
    """Also when the data behind the same name has changed: its finished rows would be of other questions."""
    folder = tmp_path / "run"
    with Run(folder, "mix", {"seed": 1, "limit": None}, {"data": "gsm8k (2 questions, 0000)"}) as at:
        at.rows.add("1", {"a": 1})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if says is None:  # a setting that is None and one that did not exist then are the same
        Run(folder, verb, settings).rows.close()
        return
    with pytest.raises(DataError, match=says) as failed:
        Run(folder, verb, settings, facts)
    assert str(folder) in str(failed.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_data_in_other_words_goes_on(tmp_path: Path) -> None:
    """Once the MixChain that a direction was trained on was gone, its calibration was refused for "another data set"."""
    said = "400 held-out training questions of gsm8k"
    with Run(tmp_path, "calibrate", {}, {"data": f"{said}, f7031ddc8b14"}) as at:
        at.rows.add("1", {})
    with Run(tmp_path, "calibrate", {}, {"data": f"{said}, which a direction made elsewhere may have seen, f7031ddc8b14"}) as at:
        assert len(at.rows) == 1
    with pytest.raises(DataError, match="another data set of the same name"):
        Run(tmp_path, "calibrate", {}, {"data": f"{said}, f7031ddc8b15"})


def test_a_run_that_did_nothing_does_not_keep_its_folder(tmp_path: Path) -> None:
    """It failed at a wrong prompt or a full disk before its first row: the mended command may use the folder."""
    with Run(tmp_path, "mix", {"prompt": "boxd"}, {"data": "a"}):
        pass
    with Run(tmp_path, "mix", {"prompt": "boxed"}, {"data": "b"}) as at:
        assert at.facts["data"] == "b"
        at.rows.add("1", {})
    assert read_json(tmp_path / "run.json")["settings"] == {"prompt": "boxed"}
    with pytest.raises(DataError, match="prompt='boxed'"):
        Run(tmp_path, "mix", {"prompt": "plain"})
    (tmp_path / "trained" / "stage-0").mkdir(parents=True)
    write_json(tmp_path / "trained" / "run.json", {"verb": "train", "settings": {"rank": 1}, "facts": {}})
    with pytest.raises(DataError, match="rank=1"):
        Run(tmp_path / "trained", "train", {"rank": 2})


def test_a_run_killed_while_it_wrote_its_record_goes_on(tmp_path: Path) -> None:
    """What it left was told as "not empty and not a run folder"."""
    (tmp_path / ".run.json.x7k2").write_text('{"verb": "mi')
    with Run(tmp_path, "mix", {}) as at:
        at.rows.add("1", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.sqlite", "run.json"]


def test_damaged_rows_are_told_in_a_line(tmp_path: Path) -> None:
    with Run(tmp_path / "a", "mix", {}) as at:
        for number in range(200):
            at.rows.add(str(number), {"text": "x" * 100})
    whole = (tmp_path / "a" / "rows.sqlite").read_bytes()
    (tmp_path / "b").mkdir()
    for damaged in (b"no database at all", whole[:4096] + b"U" * (len(whole) - 4096)):
        (tmp_path / "b" / "rows.sqlite").write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.sqlite: damaged \(.*\); put a whole copy back, or remove the folder"):
            RowStore(tmp_path / "b" / "rows.sqlite").rows()
    with pytest.raises(sqlite3.IntegrityError), contextlib.closing(RowStore(tmp_path / "a" / "rows.sqlite")) as store:
        store.add("1", {})


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty and not a run folder; name another --out"):
        Run(tmp_path, "mix", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    with Run(tmp_path / "empty", "mix", {}):
        pass
    (tmp_path / "empty" / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: not readable as JSON"):
        Run(tmp_path / "empty", "mix", {})


HOLDER = """
import sys
from pathlib import Path
from cotvalve.records import Run
with Run(Path(sys.argv[1]), "mix", {"seed": 1}) as run:
    run.rows.add("first", {})
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    """A second process (a job that was queued again) is told so; where the first was killed, the folder is free."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    with pytest.raises(DataError, match="out: another process is at work in it"):
        Run(tmp_path / "out", "mix", {"seed": 1})
    process.kill()
    process.wait()
    with Run(tmp_path / "out", "mix", {"seed": 1}) as run:
        assert run.rows.keys() == {"first"}
        with pytest.raises(DataError, match="another process is at work in it"):
            Run(tmp_path / "out", "mix", {"seed": 1})
    with pytest.raises(DataError, match="holds a run with seed=1"):
        Run(tmp_path / "out", "mix", {"seed": 2})
    with Run(tmp_path / "out", "mix", {"seed": 1}):
        pass  # what was refused does not hold it either


def test_a_file_system_that_locks_no_folders_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_handle: int, _how: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(records.fcntl, "flock", none)
    with Run(tmp_path / "out", "mix", {}), Run(tmp_path / "out", "mix", {}):
        pass


def test_settings_survive_their_way_through_json(tmp_path: Path) -> None:
    """Tuples become lists on disk; the same settings are still the same."""
    settings = {"alphas": (0.1 + 0.2, 1e-7), "name": "é", "none": None}
    for _ in range(2):
        with Run(tmp_path / "run", "mix", settings):
            pass
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["alphas"] == [0.1 + 0.2, 1e-7]
