"""The corpus of the standard library's docstrings and the questions about it."""
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

import python_docs
from conftest import ROOT, run

# in an interpreter that has none of the packages
LIST = """
import json, sys, types
stub = types.SimpleNamespace(new_file=None, InputError=None, Parser=None, run_script=None)
sys.modules.update({"records.files": stub, "utils": stub, "records": stub})
import python_docs
print(json.dumps(python_docs.list_documents()))
"""


@pytest.fixture(scope="module")
def documents():
    return {document["id"]: document for document in python_docs.list_documents()}


@pytest.fixture(scope="module")
def questions(documents):
    return python_docs.read_questions(documents.values())


def test_documents_have_a_name_a_signature_and_a_text(documents):
    assert len(documents) > 4500
    assert documents["shutil.copytree"]["title"].startswith("shutil.copytree(src, dst, symlinks=")
    assert documents["str.split"]["title"] == "str.split(self, /, sep=None, maxsplit=-1)"
    for document in documents.values():
        words = document["text"].split()
        assert python_docs.MIN_WORDS <= len(words) <= python_docs.MAX_WORDS
        assert " at 0x" not in document["title"]  # an address changes at every run


def test_another_installation_has_the_same_documents(tmp_path):
    run("toy/python_docs.py", "--out", tmp_path / "docs")  # next to torch and transformers
    lines = (tmp_path / "docs" / "corpus.jsonl").read_text().splitlines()
    documents = {document["id"]: document for document in map(json.loads, lines)}

    python = tmp_path / "other-python"
    python.symlink_to(os.path.realpath(sys.executable))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "toy"), "PYTHONHASHSEED": "7",
           "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "TZ": "Asia/Tokyo", "COLUMNS": "200"}
    done = subprocess.run([python, "-W", "ignore", "-c", LIST], cwd=tmp_path, env=env, check=True,
                          capture_output=True, text=True)
    others = {document["id"]: document for document in json.loads(done.stdout)}
    assert list(others) == list(documents)
    assert [name for name in others if others[name] != documents[name]] == []


def test_what_each_split_has(questions):
    counts = {split: len(rows) for split, rows in questions.items()}
    assert counts == {"train": 400, "dev": 80, "test": 120, "check": 106}
    rows = [row for split in questions.values() for row in split]
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == 706
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"task", "detail"} and min(kinds.values()) > 200


def test_no_gold_document_is_in_two_splits(questions):
    splits = defaultdict(set)
    for split, rows in questions.items():
        for row in rows:
            for name in row["gold"]:
                splits[name].add(split)
    assert [name for name, names in splits.items() if len(names) > 1] == []


def test_an_answer_stands_in_every_gold_document(documents, questions):
    missing = []
    for rows in questions.values():
        for row in rows:
            for name in row["gold"]:
                text = f"{documents[name]['title']} {documents[name]['text']}"
                text = re.sub(r"\s+", " ", text).lower()
                if not any(answer.lower() in text for answer in row["answers"]):
                    missing.append((row["id"], name))
    assert missing == []


def test_questions_are_in_other_words_than_their_documents(documents, questions):
    """No question has five words in a row of its gold document's text."""
    copied = []
    for rows in questions.values():
        for row in rows:
            words = re.findall(r"[a-z0-9']+", row["question"].lower())
            for name in row["gold"]:
                text = " ".join(re.findall(r"[a-z0-9']+", documents[name]["text"].lower()))
                runs = (" ".join(words[i:i + 5]) for i in range(len(words) - 4))
                copied += [(row["id"], run) for run in runs if run in text]
    assert copied == []


def test_pairs_leave_the_name_out():
    documents = [{"id": "os.path.walk", "title": "os.path.walk(top)",
                  "text": "Call walk for each folder below the top one.  It does not follow any "
                          "links that it finds."},
                 {"id": "os.one", "title": "os.one", "text": "Only one sentence stands here."}]
    pairs, rests = python_docs.list_pairs(documents)
    assert pairs == [
        {"query": "Call for each folder below the top one.",
         "pos": ["os.path.walk(top) It does not follow any links that it finds."],
         "pos_index": [0], "neg": []}]
    assert rests == [documents[0] | {"text": "It does not follow any links that it finds."}]


def test_files(tmp_path, documents, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["python_docs.py", "--out", str(tmp_path)])
    python_docs.main(python_docs.parse_args())
    assert f"{len(documents):,} documents" in capsys.readouterr().out
    corpus = [json.loads(line) for line in open(tmp_path / "corpus.jsonl")]
    labelled = json.loads(open(tmp_path / "labelled.jsonl").readline())
    gold = json.loads(open(tmp_path / "gold.train.jsonl").readline())
    assert [corpus[index] for index in labelled["pos_index"]] == gold["ctxs"]
    assert labelled["pos"][0] == f"{gold['ctxs'][0]['title']} {gold['ctxs'][0]['text']}"
    qrels = (tmp_path / "qrels.train.tsv").read_text().splitlines()
    assert qrels[1] == f"{gold['id']}\t{gold['ctxs'][0]['id']}\t1"
    assert len(open(tmp_path / "test.jsonl").readlines()) == 120
    assert len(open(tmp_path / "queries.dev.jsonl").readlines()) == 80


def test_a_python_without_some_gold_documents(documents, questions, capsys):
    others = [document for name, document in documents.items() if name != "os.sched_setaffinity"]
    splits = python_docs.read_questions(others)
    assert "no docstring of 1 gold documents, first os.sched_setaffinity" in capsys.readouterr().out
    assert len(splits["test"]) == len(questions["test"]) - 1


def test_the_examples_of_the_demo_are_not_asked_for(questions):
    """The prompt of an untrained reader shows two documents; they must not give answers away."""
    recipe = (python_docs.QUESTIONS.parent.parent / "scripts" / "real.sh").read_text()
    examples = re.findall(r"'Documentation: ([\w.]+)\(", recipe)
    gold = {name for rows in questions.values() for row in rows for name in row["gold"]}
    assert examples == ["os.getpid", "list.index"] and not gold & set(examples)
