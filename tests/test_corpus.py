"""Corpora in every format: ids and indices, kept tables of lines, other columns, bad lines."""
import gzip
import importlib
import json
import os
import pickle
import shlex
import subprocess
import sys

import pytest

from records import corpus as corpus_module
from records.corpus import Corpus
from retrieval_helpers import write_corpus, write_rows
from utils import InputError


@pytest.fixture
def corpus_file(tmp_path):
    rows = [{"_id": name, "title": name.upper(), "text": f"text {name}"} for name in "abcd"]
    return write_rows(tmp_path / "corpus.jsonl", rows)


def test_corpora(tmp_path, corpus_file):
    corpus = Corpus(corpus_file, "{title}: {text}")
    assert corpus.text(2) == "C: text c" and corpus.passage(2)["text"] == "text c"
    assert corpus.indices(["c", "x"]) == [2, -1] and corpus.indices([]) == []
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(open(corpus_file, "rb").read()))
    table = write_rows(tmp_path / "psgs.tsv",
                       ["id\ttext\ttitle", '10\t"a ""quoted"" one"\tT', "11\tplain\tU"])
    both = Corpus([str(packed), table], "{title} {text}")
    assert [both.text(i) for i in (3, 4, 5)] == ["D text d", 'T a "quoted" one', "U plain"]
    assert both.ids([5, 0]) == ["11", "a"] and both.indices(["11", "a"]) == [5, 0]
    without_ids = Corpus(write_rows(tmp_path / "c.json", [{"content": "x"}, {"content": "y"}]),
                         "{content}")
    assert without_ids.ids([1]) == ["1"]
    assert without_ids.indices(["1", "2", "x", "01"]) == [1, -1, -1, -1]
    assert without_ids.text(1) == "y"


def test_long_ids_are_no_prefixes(corpus_file):
    """An id must not be found by its first letters, cut to the width of the corpus's ids."""
    assert Corpus(corpus_file, "{text}").indices(["abc", "d", "bb"]) == [-1, 3, -1]


def test_large_corpora_are_read_once(tmp_path, monkeypatch):
    """The table of lines and FILE.lines are reused, but only for the file they were made from."""
    monkeypatch.setattr(corpus_module, "KEEP_TABLE", 10)
    path, scans, scan = tmp_path / "c.jsonl.gz", [], Corpus.scan
    monkeypatch.setattr(Corpus, "scan", lambda self, *args: scans.append(1) or scan(self, *args))
    for letters, count in (("abc", 1), ("abc", 1), ("bcd", 2)):
        if count > len(scans):
            rows = [f'{{"id": "{letter * 3}", "text": "{letter}é"}}\n' for letter in letters]
            with gzip.open(path, "wt") as file:
                file.writelines(rows)
        corpus = Corpus(str(path), "{text}")
        assert len(scans) == count
        assert [corpus.text(i) for i in range(3)] == [letter + "é" for letter in letters]
        assert corpus.indices([letters[2] * 3, "zzz"]) == [2, -1]
        assert corpus.ids([1]) == [letters[1] * 3]
    with pytest.raises(InputError, match="'bbb' occurs twice"):
        Corpus([str(path), write_rows(tmp_path / "more.jsonl", [{"id": "bbb", "text": "x"}])],
               "{text}")
    with pytest.raises(InputError, match="some files have an id column"):
        Corpus([str(path), write_rows(tmp_path / "more.jsonl", [{"text": "x"}])], "{text}")


def test_ids_packed_in_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK", 3)
    for count in (2, 3, 7):
        rows = [{"id": "x" * (i + 1), "text": str(i)} for i in range(count)]
        corpus = Corpus(write_rows(tmp_path / f"{count}.jsonl", rows), "{text}")
        assert corpus.ids(range(count)) == [row["id"] for row in rows] and len(corpus) == count
        assert corpus.indices([row["id"] for row in rows]) == list(range(count))


@pytest.mark.parametrize("content", [
    "ID;Title;Text\n7;T;one, two\n", "ID,Title,Text,Author\n7,T,\"one, two\",A\n",
    "Title\tTEXT\tid\nT\tone, two\t7\n"])
def test_headers_of_spreadsheets(content, tmp_path):
    (tmp_path / "c.csv").write_text(content)
    corpus = Corpus(str(tmp_path / "c.csv"), "{title}: {text}")
    assert corpus.text(0) == "T: one, two" and corpus.ids([0]) == ["7"]


@pytest.mark.parametrize("name,content,message", [
    ("c.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', "'a' occurs twice"),
    ("c.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b", "te', "c.jsonl:2: not valid JSON"),
    ("c.jsonl", '{"_id": "a", "content": "x"}\n', "no column 'text' for --key_template"),
    ("c.jsonl", '{"_id": "a", "text": "x"}\n\n{"text": "y"}\n', "c.jsonl:3: no '_id'"),
    ("c.jsonl", '{"_id": "a", "text": "x"}\n[1]\n', "a list"),
    ("c.jsonl", "", "holds no documents"),
    ("c.tsv", "id\ttext\ttitle\n1\tx\n", "c.tsv:2: 2 columns, but the header has 3"),
    ("c.tsv", "a\tb\n", "neither JSON lines nor a table"),
    ("c.tsv", "\nid\ttext\n", "neither JSON lines nor a table"),
    ("c.tsv", "id\ttext\n", "holds no documents"), ("c.tsv", "id\ttext", "holds no documents"),
    ("c.csv", "id,text\n", "holds no documents"), ("c.csv", "\n\n", "holds no documents"),
    ("c.csv", "Once, long ago,\nthere was\n", "neither JSON lines nor a table"),
    ("c.csv", 'id,text\n1,"a\nb"\n2,x,y\n', "c.csv:4: 3 columns, but the header has 2"),
    ("c.csv", 'id,text\n1,a\n,"b\nc"\n', "c.csv:3: no 'id'"),
    ("c.csv", 'id,text\n1,"a\nb"\n1,c\n', "'1' occurs twice"),
    ("c.csv", 'id,text\n1,a\n2,"b\n', "c.csv:3: does not follow csv.s rules for quotes"),
    ("c.csv", 'id,text\n1,"a" b\n', "c.csv:2: does not follow csv.s rules for quotes"),
    ("c.tsv", 'id\ttitle\ttext\n1\tT\t"a\n2\tT\tb"\n', "c.tsv:2: a quote opens a cell"),
    ("c.tsv", 'id\ttext\ttitle\n1\ta\rb\tT\n', "c.tsv:2: 2 columns, but the header has 3"),
    ("c.csv", "x" * 9000 + "," + "y" * 9000, "^.{,700}$")])
def test_bad_corpora(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Corpus(str(tmp_path / name), "{title} {text}")


def test_passages_of_other_columns(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")
    assert corpus.text(0) == "text 0" and corpus.passage(0)["title"] == ""  # a title that is null
    rows = [{"id": "1", "contents": "all"}, {"id": "2", "contents": "more"}]
    pyserini = Corpus(write_rows(tmp_path / "pyserini.jsonl", rows), "{contents}")
    assert pyserini.passage(1) == {"id": "2", "title": "", "text": "more"}
    (tmp_path / "own.jsonl").write_text('{"id": "1", "name": "n", "abstract": "b"}\n')
    assert Corpus(str(tmp_path / "own.jsonl"), "{name}: {abstract}").passage(0)["text"] == "n: b"
    (tmp_path / "pyserini.jsonl").write_text('{"id": "1", "contents": "all"}\n{"id": "2"}\n')
    with pytest.raises(InputError, match="pyserini.jsonl:2: no column 'contents'"):
        Corpus(str(tmp_path / "pyserini.jsonl"), "{contents}")


def test_a_mark_of_the_encoding_is_no_letter(tmp_path):
    (tmp_path / "c.tsv").write_text("\ufeffid\ttext\ttitle\n1\ta\tb\n")
    (tmp_path / "c.json").write_text('\ufeff[{"id": "1", "text": "a", "title": "b"}]')
    for name in ("c.tsv", "c.json"):
        assert Corpus(str(tmp_path / name),
                      "{text}").passage(0) == {"id": "1", "title": "b", "text": "a"}


@pytest.mark.parametrize("content", [
    'id,title,text\n7,T,"one, ""two""\nthree"\n,,\n8,U,four\n',
    'id, title, text\n7, T, "one, ""two""\nthree"\n\n8, U, four\n',
    '"id"\t"title"\t"text"\n7\tT\t"one, ""two""\nthree"\n8\tU\tfour\n',
    'id\ttext\ttitle\n8\tfour\tU\n7\t"one, ""two""\nthree"\tT\n'])
def test_tables_whose_rows_are_no_lines(content, tmp_path):
    """Read commas, cells of several lines and old Macs' line ends, gzipped or not; then read the
    FILE.lines that the first time has written.
    """
    forms = {"unix": content, "windows": content.replace("\n", "\r\n"),
             "mac": content.replace("\n", "\r")}
    for name, text in forms.items():
        (tmp_path / name).write_text(text, newline="")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (name, f"{name}.gz", name, f"{name}.gz"):
            corpus = Corpus(str(tmp_path / path), "{title} {text}")
            doc_indices = corpus.indices(["7", "8"])
            assert len(corpus) == 2 and corpus.text(doc_indices[1]) == "U four"
            lines = corpus.passage(doc_indices[0])["text"].splitlines()
            assert lines == ['one, "two"', "three"]
        assert (tmp_path / f"{name}.lines").exists()


def test_a_table_needs_the_columns_of_the_template(tmp_path):
    path = write_rows(tmp_path / "c.csv", ["contents,date", "all,1999", "more,2000"])
    with pytest.raises(InputError) as error:
        Corpus(path, "{title} {text}")
    assert "no column 'text'" in str(error.value)
    assert "for 'contents', give --key_template '{title} {contents}'" in str(error.value)
    assert not (tmp_path / "c.csv.lines").exists()
    corpus = Corpus(path, "{title} {contents}")
    assert corpus.passage(1) == {"id": "1", "title": "", "text": "more"}
    one_column = Corpus(write_rows(tmp_path / "c.tsv", ["text", "a, b", "c"]), "{title} {text}")
    assert [one_column.text(i) for i in range(2)] == ["a, b", "c"]


def test_a_table_that_is_not_utf8(tmp_path):
    (tmp_path / "c.csv").write_bytes("id,text\n1,a\n2,é\n".encode("latin-1"))
    with pytest.raises(InputError, match="c.csv:3: byte .* is not UTF-8"):
        Corpus(str(tmp_path / "c.csv"), "{text}")


def test_a_changed_table_is_read_anew(tmp_path):
    path = write_rows(tmp_path / "c.csv", ["id,text", '1,"a', 'b"'])
    assert len(Corpus(path, "{text}")) == 1
    write_rows(tmp_path / "c.csv", ["id,text", '1,"a', 'b"', "2,c"])
    assert len(Corpus(path, "{text}")) == 2
    write_rows(tmp_path / "c.csv", ["id\ttext", "3\td"])
    assert Corpus(path, "{text}").ids([0]) == ["3"]


def test_long_cells_are_read(tmp_path):
    (tmp_path / "long.tsv").write_text("id\ttext\ttitle\n1\t" + "word " * 40_000 + "\tit\n")
    assert len(Corpus(str(tmp_path / "long.tsv"), "{text}").text(0)) == 199_999


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path, monkeypatch):
    (tmp_path / "store.py").write_text("class Document:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    document = importlib.import_module("store").Document()  # as LangChain has them
    document.page_content, document.metadata = "a text", {"title": "T"}
    rows = [document, {"_id": "x", "text": "another"}]
    for name in ("my documents.pkl", "documents"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(rows))
        with pytest.raises(InputError, match=f"{name}: a pickle") as error:
            Corpus([path], "{title} {text}")
        message = str(error.value)
        assert "\n" not in message
        command = message[message.index("python -c"):]
        subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True,
                       check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        converted = [json.loads(line) for line in open(path.with_suffix(".jsonl"))]
        assert converted == [{"title": "T", "text": "a text"}, rows[1]]
