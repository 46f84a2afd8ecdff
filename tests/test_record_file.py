"""records/record_file.py: records that stay on disk are the records that a list holds."""
import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from records import json_values, record_file
from records.hashes import hash_file
from records.reader_records import RecordsOnDisk, change_contexts, read_facts, read_records
from records.reading import iterate_json, scan_json
from records.record_file import hash_record_file
from utils import InputError

RECORDS = [
    {"question": "who é", "answers": ["Ada", "中"], "id": 7,
     "ctxs": [{"title": "é\n", "text": "a 中 b", "score": "1"}, {"text": "c", "score": 2.5}]},
    {"question": "what", "target": "x", "ctxs": []},
    {"query": "when", "answer": "now", "passage": "gold", "other": {"deep": [1, "\u2028", None]},
     "ctxs": [{"id": "d", "text": "t"}, {"text": "u", "score": 3, "title": None}]},
]
FORMS = {
    "list.json": lambda rows: json.dumps(rows),
    "pretty.json": lambda rows: "\ufeff\n " + json.dumps(rows, indent=2, ensure_ascii=False),
    "lines.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n\r\n"
                                        for row in rows),
    "old_mac.jsonl": lambda rows: "\r".join(map(json.dumps, rows)),
    "spread.jsonl": lambda rows: "\n".join(json.dumps(row, indent=1, ensure_ascii=False)
                                           for row in rows),
    "list.json.gz": lambda rows: json.dumps(rows),
    "lines.jsonl.gz": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
}


@pytest.fixture
def on_disk(monkeypatch):
    """Treat every file as large."""
    monkeypatch.setattr(record_file, "LARGE", 0)


def write(path, text):
    """Write a text, gzipped if the path ends in .gz, and return the path."""
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def read_both(path, monkeypatch, *arguments):
    """Return (the list, the RecordsOnDisk) of a file's records."""
    listed = read_records(path, *arguments)
    monkeypatch.setattr(record_file, "LARGE", 0)
    stored = read_records(path, *arguments)
    assert isinstance(listed, list)
    assert isinstance(stored, RecordsOnDisk)
    return listed, stored


# ---------------------------------------------------------------- the values of a file

@pytest.mark.parametrize("chunk", [1, 7, 10 ** 6])
@pytest.mark.parametrize("form", FORMS)
def test_files_are_read_piece_by_piece(form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "CHUNK", chunk)
    path = write(tmp_path / form, FORMS[form](RECORDS))
    assert [item for item, _ in iterate_json(path)] == RECORDS
    content = gzip.open(path).read() if form.endswith(".gz") else path.read_bytes()
    for item, _, (start, end) in scan_json(path):
        assert json.loads(content[start:end]) == item


@pytest.mark.parametrize("chunk", [1, 10 ** 6])
@pytest.mark.parametrize("text, place", [
    ('[{"a": 1},\n {"b": tru}]', ":2: not valid JSON at column 8"),
    ('[{"a": 1} {"b": 2}]', ":1: not valid JSON at column 11"),
    ('[{"a": 1}, {"b": "no end', ":1: not valid JSON at column 18"),
    ('[{"a": 1}, {"b": 2}', ":1: not valid JSON at column 20"),
    ('[{"a": 1}\n] {"b": 2}', ":2: not valid JSON at column 3 (Extra data)"),
    ('[{"a": 1},\n{"b": "\\ud800"}]', ":2: \\ud800 is half of a character"),
    ('[{"a": 12345' + "6" * 5000 + "}]", ":1: the JSON that begins here holds an integer"),
    ("[" * 100_000, ":1: the JSON that begins here is nested a thousand levels deep"),
    ('"text"', ": holds one str, not a list of records"),
])
def test_malformed_lists_are_reported_with_their_line(text, place, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "CHUNK", chunk)
    path = write(tmp_path / "f.json", text)
    with pytest.raises(InputError) as error:
        list(iterate_json(path))
    assert str(error.value).startswith(f"{path}{place}")


# ---------------------------------------------------------------- records on disk

@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("form", FORMS)
def test_records_on_disk_are_those_in_memory(form, keep, tmp_path, monkeypatch):
    path = write(tmp_path / form, FORMS[form](RECORDS))
    listed, stored = read_both(path, monkeypatch, keep)
    for again in (stored, read_records(path, keep)):
        assert list(again) == listed
        assert again[:2] == listed[:2]
        assert again[-1] == listed[-1]
        assert len(again) == len(listed)
        for one, other in zip(read_facts(again), read_facts(listed), strict=True):
            for name in ("id", "answers", "target", "num_contexts", "num_gold"):
                assert one.get(name) == other.get(name)
            # these count contexts that are not kept, too
            assert one["num_unscored"] >= other["num_unscored"]
            assert one["num_bytes"] >= other["num_bytes"]


def test_changed_contexts_are_read_and_described(tmp_path, monkeypatch):
    path = write(tmp_path / "f.json", json.dumps(RECORDS))
    listed, stored = read_both(path, monkeypatch)
    for records in (listed, stored):
        change_contexts(records, lambda record: [{"text": record["question"]}, *record["ctxs"]])
    assert list(stored) == listed
    assert [facts["num_contexts"] for facts in read_facts(stored)] == [3, 1, 3]


def test_errors_and_warnings_are_those_of_a_list(tmp_path, on_disk):
    rows = [{"question": "q", "ctxs": [{"text": "t", "score": i} for i in range(3)]}] * 2
    path, logged = write(tmp_path / "f.json", json.dumps(rows)), []
    for _ in range(2):  # with the table and without it
        read_records(path, log=logged.append)
    assert len(logged) == 2
    assert "the scores of every question rise" in logged[0] and logged[0] == logged[1]
    bad = write(tmp_path / "bad.json", json.dumps([*rows, {"answers": []}]))
    with pytest.raises(InputError, match=r"bad.json, record 2: no 'question'"):
        read_records(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "f.json",
                                                                "f.json.records"]


def test_an_object_of_records_is_held_in_memory(tmp_path, on_disk):
    path = write(tmp_path / "f.json", json.dumps({"a": RECORDS[0], "b": RECORDS[1]}))
    assert [record["id"] for record in read_records(path)] == [7, "b"]
    assert not os.path.exists(f"{path}.records")


# ---------------------------------------------------------------- tables

def test_a_changed_file_is_noticed(tmp_path, on_disk):
    path = write(tmp_path / "f.jsonl", FORMS["lines.jsonl"](RECORDS))
    stored = read_records(path)
    path.write_text(path.read_text().replace("what", "why?"))
    with pytest.raises(InputError, match="has changed since it was first read; start again"):
        stored[0]
    assert read_records(path)[1]["question"] == "why?"
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        stored[0]


def test_the_hash_of_a_large_file_is_kept(tmp_path, on_disk):
    path = write(tmp_path / "f.json", json.dumps(RECORDS))
    kept = tmp_path / "f.json.records" / "hash.json"
    for text in ("one", "two"):
        path.write_text(text)
        assert hash_record_file(path) == hash_file(path) == json.loads(kept.read_text())["hash"]
        kept.write_text(kept.read_text().replace('"hash": "', '"hash": "kept '))
        assert hash_record_file(path) == "kept " + hash_file(path)
    kept.write_text("damaged")
    assert hash_record_file(path) == hash_file(path)


@pytest.mark.parametrize("damage", [
    lambda content: content[:-5], lambda content: b"", lambda content: b"\n" + content,
    lambda content: content.replace(b"[0", b"[1", 1), lambda content: content[:len(content) // 2]])
def test_a_damaged_table_is_made_again(damage, tmp_path, on_disk):
    path = write(tmp_path / "f.json", json.dumps(RECORDS))
    whole = list(read_records(path))
    table = tmp_path / "f.json.records" / "reader.jsonl"
    content = table.read_bytes()
    table.write_bytes(damage(content))
    assert list(read_records(path)) == whole
    assert table.read_bytes() == content


def test_a_folder_that_cannot_be_written_gets_no_table(tmp_path, on_disk, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for form in ("list.json", "lines.jsonl.gz"):
        path = write(tmp_path / form, FORMS[form](RECORDS))
        records = read_records(path)
        assert isinstance(records, list) == form.endswith(".gz")
        assert len(list(records)) == len(RECORDS)
    assert len(list(tmp_path.iterdir())) == 2


# opens a file of records, slowly, and prints how many there are
OPENER = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from records import reader_records, record_file
record_file.LARGE = 0
def inspect(item, location, index, inspect=reader_records.inspect_record):
    print(index, flush=True)
    time.sleep(float(sys.argv[2]))
    return inspect(item, location, index)
reader_records.inspect_record = inspect
print("read", len(reader_records.read_records(sys.argv[1])))
"""


def start_opener(path, seconds):
    """Return a process that has begun to make the table of a file, a record every `seconds`."""
    return subprocess.Popen([sys.executable, "-c", OPENER, str(path), str(seconds)],
                            stdout=subprocess.PIPE, text=True)


def test_a_killed_pass_leaves_nothing_and_one_process_works_for_all(tmp_path, on_disk):
    path = write(tmp_path / "f.json", json.dumps(RECORDS))
    killed = start_opener(path, 60)
    assert killed.stdout.readline() == "0\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.json"]
    openers = [start_opener(path, 0.5) for _ in range(2)]
    printed = sorted(opener.communicate()[0] for opener in openers)
    assert printed == ["0\n1\n2\nread 3\n", "read 3\n"]
    assert [entry.name for entry in (tmp_path / "f.json.records").iterdir()] == ["reader.jsonl"]
