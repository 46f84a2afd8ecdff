"""Mangled files: every reading function reads all of them, or refuses them in one line that names
the file. tests/nightly/test_mangled_inputs.py tries many more files.
"""
import csv
import gzip
import io
import json
import os
import random
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

import causal_helpers
import conftest
import dense.flags
import fid_data
import lm_score
import retrieval.flags
import train_epoch
from bench.timing import time_limit
from data import pack_passages
from dense.model import BiEncoder, CrossEncoder
from dense.texts import Texts, read_trained_flags
from dense.training_data import DataSettings, TaskSettings, read_training
from federated.server import Server
from federated.server import restore_server_state as restore_federation
from federated.server import save_server_state as save_federation
from federated.split import group_topics
from federated.strategies import make_strategy
from golden_retrievers import dpr_file, mindpr_file
from model import FiDT5
from reader import open as readers
from reader.frozen import list_missing
from records.corpus import TABLE_VERSION, Corpus, keep_table
from records.files import describe_version
from records.journal import read_journal
from records.qrels import merge_qrels
from records.questions import make_question, read_questions, read_unique_questions
from records.reader_records import read_records
from records.reading import read_json, read_lines
from retrieval import bm25
from retrieval.bm25_index import open_index
from retrieval.dev_set import make_annotated_set, read_dev_set
from retrieval.faiss_index import read_index
from retrieval.fingerprint import check_fingerprint
from retrieval.results import read_run
from retrieval.search import SearchSettings
from retrieval.vectors import open_array
from table import read_measures
from training.checkpoints import load_tokenizer, read_config, read_training_args
from training.loop import Progress, make_optimizer
from training.resume import load_state, restore_state, save_state
from utils import InputError, World

FILES = 200   # mangled files for each reader of text
FOLDERS = 10  # mangled folders for each opener of models, which takes longer
ENDINGS = (".json", ".jsonl", ".tsv", ".csv", ".txt", ".gz", "")
LONGEST = 400   # characters of a message
PATIENCE = 20   # seconds that a file may take
ALONE = World(0, 0, 1, torch.device("cpu"))
TEMPLATE = "{title} {text}"

# ---------------------------------------------------------------- mangling

# JSON values, as spelled in a file, that no field expects
ODD = ["null", "true", "false", "0", "-1", "7", "2.5", "1e300", "1e400", "-1e400", "NaN",
       "Infinity", "9" * 5000, "1" + "0" * 400, "1000000000", '""', '" "', '"x"',
       '"' + "long " * 1000 + '"', r'"\ud800"', r'"a\udc00b"', r'"\u0000"', r'"a\nb"', "[]", "{}",
       "[null]", "[[]]", "[1]", '["a"]', '["a", null]', '{"a": 1}', '[{"text": 3}]',
       "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 400 + "]" * 400]
HOLE = "a hole for an odd value"


def list_places(node):
    """Return [(list or dictionary, index or key)] of everything below a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    places = []
    for key in keys:
        places.append((node, key))
        if isinstance(node[key], (dict, list)):
            places += list_places(node[key])
    return places


def mangle_value(rng, node, odd_values):
    """Put an odd value somewhere into a value, or drop, double, rename or wrap something."""
    parent, key = rng.choice(list_places(node))
    change = rng.choice(["odd", "odd", "odd", "drop", "wrap", "swap", "rename"])
    if change == "odd":
        parent[key] = rng.choice(odd_values)
    elif change == "drop":
        del parent[key]
    elif change == "wrap":
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}])
    elif change == "swap":
        other, other_key = rng.choice(list_places(node))
        parent[key] = json.loads(json.dumps(other[other_key]))
    elif isinstance(parent, dict):
        parent[rng.choice(["id", "text", "", "x" * 3000])] = parent.pop(key)


def mangle_json(content, rng):
    """Return the bytes of JSON lines, a JSON list or an object, with something odd in it."""
    text = content.decode()
    is_lines = text.startswith("{") and text.count("\n") > 1 and text.split("\n")[1][:1] == "{"
    value = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
    if value:  # an empty value has nothing to change
        mangle_value(rng, value, [HOLE])
    if is_lines:
        text = "".join(json.dumps(row) + "\n" for row in value)
    else:
        text = json.dumps(value)
    return text.replace(f'"{HOLE}"', rng.choice(ODD)).encode()


def mangle_lines(content, rng):
    """Return bytes with a line dropped, doubled, moved, emptied, joined with the next or cut."""
    lines = content.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.choice(["drop", "double", "move", "empty", "join", "cut"])
    if change == "drop":
        del lines[i]
    elif change == "double":
        lines.insert(j, lines[i])
    elif change == "move":
        lines.insert(j, lines.pop(i))
    elif change == "empty":
        lines[i] = rng.choice([b"", b" ", b"\t", b"\r"])
    elif change == "join":
        lines[i:i + 2] = [b" ".join(lines[i:i + 2])]
    else:
        lines[i] = lines[i][:rng.randrange(len(lines[i]) + 1)]
    return b"\n".join(lines)


def mangle_bytes(content, rng):
    """Return bytes with some cut off, changed, left out or inserted, also NUL, a BOM or Latin-1."""
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice([0, 1, 1, 2, 50]))
    put_in = rng.choice([b"", b"\r", b"\0", b"\n", b"\t", b'"', b"[", b"{", b"\\", b"9" * 5000,
                         b"\xef\xbb\xbf", "é".encode("latin-1"), rng.randbytes(3)])
    change = rng.choice(["cut", "mark", "old ends", "replace", "replace", "replace", "replace"])
    if change == "cut":
        return content[:start]
    if change == "mark":
        return b"\xef\xbb\xbf" + content
    if change == "old ends":
        return content.replace(b"\n", b"\r")
    return content[:start] + put_in + content[end:]


def mangle(content, rng, is_json=False):
    """Return the content of a file, mangled once or twice, or almost empty."""
    if rng.random() < 0.01:
        return rng.choice([b"", b"\n", b"\n\n \n", b"\0" * 100, b"\xef\xbb\xbf", b"\xff\xfe"])
    ways = [mangle_lines, mangle_bytes] + [mangle_json] * (3 if is_json else 0)
    content = rng.choice(ways)(content, rng)
    return mangle_bytes(content, rng) if rng.random() < 0.1 else content


# ---------------------------------------------------------------- outcomes

def complain(read, path, name, least, outcomes=None):
    """Return (kind, message) of a fault in how a function reads a file, or None.

    At least `least` records must be read. outcomes: a Counter of right results, "read" or
    "refused".
    """
    outcomes = Counter() if outcomes is None else outcomes
    try:
        with time_limit(PATIENCE):
            count = read(path)
    except InputError as error:
        message = str(error)
        if "\n" in message or "\r" in message:
            return "a message of several lines", message
        if len(message) > LONGEST:
            return "a long message", message
        if name not in message:
            return "a message without the file's name", message
        outcomes["refused"] += 1
        return None
    except BaseException as error:  # a panic in the tokenizers' library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, str(error)[:300]
    if least is not None and count < least:
        return "lost records", f"{count} of {least}"
    outcomes["read"] += 1
    return None


def expect_no_complaints(complaints):
    """Fail with the kinds of complaints, and the first complaint of each kind."""
    counts = Counter((reader, kind) for reader, kind, _, _ in complaints)
    firsts = {(reader, kind): f"{text}  [{content[:300]!r}]" for reader, kind, text, content
              in reversed(complaints)}
    report = [f"{count:6} {reader}: {kind}: {firsts[reader, kind]}" for (reader, kind), count
              in counts.most_common()]
    assert not complaints, "\n".join([f"{len(complaints)} complaints", *report])


# ---------------------------------------------------------------- files of texts

CONTEXTS = [{"id": "d0", "title": "T", "text": "some text", "score": 2.5, "has_answer": False},
            {"id": "d2", "title": "", "text": "another", "score": "1"}]
RECORDS = [{"id": f"q{i}", "question": f"who is it {i}", "answers": ["Foo", "bar"],
            "target": "Foo", "ctxs": CONTEXTS, "passage": CONTEXTS[:1],
            "chat_history": ["one", {"role": "user", "content": "two"}]} for i in range(3)]
TRIVIA = [{"question": "who", "answer": {"Value": "ROME", "Aliases": ["Rome"]}, "ctxs": CONTEXTS}]
NQ_OPEN = [{"question": f"who is it {i}", "answer": ["a", "b"]} for i in range(3)]
TRIVIA_DATA = [{"Question": f"who {i}", "QuestionId": f"q{i}", "SearchResults": [{"Rank": 0}],
                "Answer": {"Value": "ROME", "Aliases": ["Rome"]}} for i in range(3)]
EMBEDDER = [{"query": "q0", "pos": ["a"], "neg": ["b", {"title": "t", "text": "c"}],
             "pos_index": [0], "neg_index": [1, 2], "teacher_scores": [1.5, -2, 0], "task": "qa",
             "answers": ["a"]},
            {"query": "q1", "history": ["x", "y", "z"], "teacher_scores": [1, 2.5, 3],
             "task": "qa", "pos_index": [3], "answers": ["b"]}]
SCORED = [{"question": "q0", "ctxs": [dict(context, score=-1.5, retrieval_score=2)
                                      for context in CONTEXTS]},
          {"query": "q1", "ctxs": CONTEXTS, "teacher_scores": [-3, 1.5]}]
DPR = [{"question": f"q{i}", "answers": ["a"], "positive_ctxs": CONTEXTS[:1],
        "hard_negative_ctxs": CONTEXTS[1:], "negative_ctxs": CONTEXTS} for i in range(3)]
DOCUMENTS = [{"_id": f"d{i}", "title": f"T{i}", "text": f"text number {i}"} for i in range(5)]
QUERIES = [{"_id": f"q{i}", "text": f"who is it {i}"} for i in range(3)]
NQ = ["who was it\t['a', \"b's\"]", "where\t['c']", '"what ""is"" it"\t"[\'d\', ""e""]"']
TABLE = ["id\tquestion", "q0\twho is it 0", 'q1\t"who" is it']
COMMA_TABLE = ["id,question,answers", '1,"who, where","[""a"", ""b""]"', "2,who wrote it,a baker",
               '3,"two', 'lines",it']
COMMA_PASSAGES = ["id,title,text", '1,T,"the first, with a comma"', '2,U,"the', 'second"', "3,V,x"]
PASSAGES = ["id\ttext\ttitle", "1\tthe first\tT", '2\t"the ""second"""\tU', "3\tthe third\tV"]
RUN = ["q0 Q0 d0 1 3.5 x", "q0 Q0 d2 2 3 x", "q1 Q0 d1 1 -1e-3 x"]
TREC = ["q0 0 d0 1", "q0 0 d1 0", "q1 0 d2 2.5", "q2 0 d4 1"]
BEIR = ["query-id\tcorpus-id\tscore", "q0\td0\t1", "q1\td1\t0", "q1\td2\t2"]
JSON_QRELS = [{"qid": "q0", "docid": "d0", "score": 1}, {"qid": "q1", "docid": "d1", "score": 0}]
QUESTIONS = [make_question(row, "f", 0) for row in QUERIES]
FLAGS = (DataSettings(key_template=TEMPLATE, train_group_size=2, inbatch_same_dataset="epoch",
                      seed=0),
         TaskSettings(select_positive="teacher", teacher_scores_margin=0.1, teacher_scores_min=-5))


class Log(list):
    """Keep logged lines; call it as a log function."""

    def __call__(self, line):
        self.append(line)

    @property
    def told(self):
        """Return the number of records that are left out by the logged lines."""
        return sum(int(word) for line in self for word in line.split()[:2] if word.isdigit())


def count_writable(rows):
    """Return the number of rows that were read; the scripts must be able to write them again."""
    json.dumps(rows, ensure_ascii=False).encode()
    return len(rows)


def read_whole_corpus(path):
    corpus = Corpus([path], TEMPLATE)
    for doc_index in range(len(corpus)):
        count_writable([corpus.text(doc_index), corpus.passage(doc_index)])
    assert corpus.indices(corpus.ids(range(len(corpus)))) == list(range(len(corpus)))
    return len(corpus)


def read_examples(**flags):
    log = Log()
    queries = {f"q{i}": "" for i in range(3)}
    data, task = FLAGS
    task = replace(task, **{name: flags.pop(name) for name in vars(task).keys() & flags.keys()})
    data = read_training(replace(data, **flags), task, corpus(), queries, log)
    return len(data.examples) + log.told


def corpus():
    return Corpus(["corpus.jsonl"], TEMPLATE)


def read_dev(path, metrics):
    log = Log()
    return len(read_dev_set(path, corpus(), metrics, TEMPLATE, log).queries) + log.told


def read_earlier(path):
    log = Log()
    results = read_run(path, QUESTIONS, corpus(), log)
    return int((results.indices >= 0).sum()) + log.told


def count_lines(content):
    """Return the number of a file's lines with text or, if it is JSON, of its objects: one may
    take several lines.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = sum(bool(line.strip()) for line in content.split(b"\n"))
    if not content.startswith(b"{"):
        return lines
    text, offset, count = content.decode("utf-8", "replace").strip(), 0, 0
    try:
        while offset < len(text):
            _, offset = json.JSONDecoder().raw_decode(text, offset)
            offset = len(text) - len(text[offset:].lstrip())
            count += 1
    except (ValueError, RecursionError):
        return lines
    return count


def count_rows(content):
    """Count the rows of a table under its header; rows inside an unclosed quote count as lost."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    rows = [row for row in reader if any(map(str.strip, row))]
    taken_in = sum(cell.count("\n") for row in rows for cell in row if "\t" in cell)
    return len(rows) - 1 + taken_in


def count_items(content):
    """Count the records of a JSON list; any other file counts as 0."""
    try:
        return len(json.loads(content.removeprefix(b"\xef\xbb\xbf")))
    except (ValueError, RecursionError, TypeError):
        return 0


def count_pairs(content):
    """Count the different pairs of query and document in TREC's qrels."""
    rows = [line.split() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return len({(cells[0], cells[-2]) for cells in rows if len(cells) > 2})


def read_qrels(path, filters=""):
    return sum(map(len, merge_qrels([f"qrels={path}{filters}"]).values()))


def read_dev_qrels(path):
    queries = {f"q{i}": "" for i in range(3)}
    return make_annotated_set(merge_qrels([f"qrels={path}"]), corpus(), queries, 5, path)


def read_index_json(path):
    return check_fingerprint(os.path.dirname(path), {"documents": 5, "model": ""})


# {name: (file's name, rows, function of its path, count of the records in its content or None)}
def lm_score_args(path):
    return Namespace(eval_data=path, model_name_or_path=path, t5_name="tokenizer", tokenizer=None,
                     corpus=None,
                     key_template=TEMPLATE, template=None, answer="mean", likelihood="sum",
                     bf16=False, chat_template=None, context_max_length=60, key_max_length=20)


def read_scored(path):
    paths = lm_score.ScoringPaths(path, path, [], "")
    jobs, _ = lm_score.read_jobs(paths, None, lm_score_args(path), False, ALONE)
    return count_writable([job.record for job in jobs])


TOPICS = [{"question": f"who is {i}", "topic": ["town", "river", 3][i % 3]} for i in range(5)]

READERS = {
    "records": ("r.jsonl", RECORDS, lambda path: count_writable(read_records(path)), count_lines),
    "record list": ("r.json", [RECORDS], lambda path: count_writable(read_records(path, 1)),
                    count_items),
    "TriviaQA": ("r.json", [TRIVIA], lambda path: count_writable(read_records(path)), count_items),
    "questions": ("q.jsonl", EMBEDDER, lambda path: count_writable(read_questions(path)),
                  count_lines),
    "DPR's csv": ("q.csv", NQ, lambda path: count_writable(read_questions(path)), count_lines),
    "table": ("q.tsv", TABLE, lambda path: count_writable(read_questions(path)), count_rows),
    "comma table": ("q.csv", COMMA_TABLE, lambda path: count_writable(read_questions(path)), None),
    "queries": ("q.jsonl", QUERIES, lambda path: read_unique_questions([path]), None),
    "gzipped records": ("r.jsonl.gz", RECORDS, lambda path: count_writable(read_records(path)),
                        count_lines),
    "gzipped corpus": ("c.tsv.gz", PASSAGES, read_whole_corpus, count_rows),
    "gzipped qrels": ("q.qrels.gz", TREC, read_qrels, count_pairs),
    "NQ-open": ("n.jsonl", NQ_OPEN, lambda path: len(fid_data.read_nq(path)), count_lines),
    "TriviaQA's Data": ("t.json", [{"Data": TRIVIA_DATA, "Version": 1.0}],
                        lambda path: len(fid_data.read_tqa(path)), None),
    "measures": ("m.json", [{"em": 0.5, "recall@5": 1}],
                 lambda path: read_measures([path], ["em", "recall@5"]), None),
    "JSON": ("r.jsonl", RECORDS, lambda path: count_writable(read_json(path)), count_lines),
    "lines": ("r.jsonl", RECORDS, lambda path: len(list(read_lines(path))),
              lambda content: min(count_lines(content), content.strip().count(b"\n") + 1)),
    "lines of a list": ("r.json", [RECORDS], lambda path: list(read_lines(path)), None),
    "corpus": ("c.jsonl", DOCUMENTS, read_whole_corpus, count_lines),
    "corpus list": ("c.json", [DOCUMENTS], read_whole_corpus, count_items),
    "corpus table": ("c.tsv", PASSAGES, read_whole_corpus, count_rows),
    "corpus with commas": ("c.csv", COMMA_PASSAGES, read_whole_corpus, None),
    "TREC qrels": ("q.qrels", TREC, read_qrels, count_pairs),
    "BEIR qrels": ("q.tsv", BEIR, read_qrels, None),
    "JSON qrels": ("q.jsonl", JSON_QRELS, read_qrels, None),
    "filtered qrels": ("q.qrels", TREC, lambda path: read_qrels(
        path, ",min_score=0,max_score=9,top_k=1,score=ceil"), None),
    "query subset": ("s.txt", TREC, lambda path: read_qrels("good.qrels", f",query_subset={path}"),
                     None),
    "run": ("x.run", RUN, read_earlier, None),
    "earlier result": ("x.json", RECORDS, read_earlier, None),
    "LLM-Embedder": ("t.json", EMBEDDER, lambda path: read_examples(train_data=[path]),
                     count_lines),
    "DPR": ("t.json", [DPR], lambda path: read_examples(train_data=[path]), count_items),
    "scored contexts": ("t.json", SCORED, lambda path: read_examples(
        train_data=[path], loss="fid-kd", select_positive="first", teacher_scores_margin=None),
        count_lines),
    "positives": ("q.qrels", TREC, lambda path: read_examples(
        positives=[f"qrels={path}"], negatives=["qrels=other.qrels"]), None),
    "graded": ("q.qrels", TREC, lambda path: read_examples(
        graded=[f"qrels={path}"], train_group_size=1), None),
    "dev set": ("d.jsonl", EMBEDDER, lambda path: read_dev(path, ["mrr", "nq"]), count_lines),
    "DPR's dev set": ("d.json", [DPR], lambda path: read_dev(path, ["mrr"]), count_items),
    "dev qrels": ("q.qrels", TREC, read_dev_qrels, None),
    "fingerprint": ("folder/index.json", [{"documents": 5, "model": "", "files": [["", 3, "ab"]]}],
                    read_index_json, None),
    "made_of.json": ("folder/made_of.json", [{"documents": 5, "records": {"train": "ab"}}],
                     lambda path: list_missing("folder", {"documents": 5}, {"train": "ab"}), None),
    "args.json": ("folder/args.json", [{"num_contexts": 5, "max_length": 100, "args": {}}],
                  lambda path: read_training_args("folder"), None),
    "keys to score": ("t.json", EMBEDDER, lambda path: read_scored(path), count_lines),
    "journal": ("x.journal.0", [{"data": "a"}, {"part": 0, "result": [[1.5, -2.5]]},
                                  {"part": 1, "result": [[0.5]]}],
                lambda path: read_journal(path, {"data": "a"}), None),
    "topics": ("t.jsonl", TOPICS, lambda path: sum(map(len, group_topics(read_json(path), "topic")
                                                       .values())), count_lines),
    "retriever's flags": ("folder/args.json", [{"args": {"key_max_length": 20, "version": "bge"}}],
                          lambda path: read_trained_flags("folder"), None),
}


def spell(rows):
    """Return the bytes of a file with one row, a text or a JSON value, per line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "".join(line + "\n" for line in lines).encode()


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    """Change to a directory with the intact files that are read along with mangled ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(spell(DOCUMENTS))
    (tmp_path / "good.qrels").write_bytes(spell(TREC))
    (tmp_path / "other.qrels").write_bytes(spell(f"q{i} 0 d3 0" for i in range(3)))
    (tmp_path / "folder").mkdir()
    return tmp_path


def read_mangled(reader, files, rng, outcomes):
    """Return [(reader, kind, message, content)] of the faults in how a reader reads mangled files.

    Right results are counted in outcomes.
    """
    path, rows, read, count = READERS[reader]
    whole, name = spell(rows), path.split("/")[0]
    assert complain(read, path_of(path, whole), name, count and count(whole)) is None, reader
    complaints = []
    for _ in range(files):
        content = mangle(whole, rng, is_json=not isinstance(rows[0], str))
        given, least, pack = path, count and count(content), None
        if "/" not in path and rng.random() < 0.05:  # the ending belongs to another format
            given, least = path.split(".")[0] + rng.choice(ENDINGS), None
        elif path.endswith(".gz") and rng.random() < 0.5:
            pack, least = rng, None
        complaint = complain(read, path_of(given, content, pack), given.split("/")[0], least,
                             outcomes)
        if complaint:
            complaints.append((reader, *complaint, content))
    return complaints


def test_readers_read_mangled_files_whole_or_refuse_them_in_one_line(work_folder):
    complaints = []
    for reader in READERS:
        complaints += read_mangled(reader, FILES, random.Random(reader), Counter())
    expect_no_complaints(complaints)


def path_of(path, content, mangle_packed=None):
    """Write a file and return its path.

    It is gzipped if the name ends in .gz, and then mangled if a random generator is given.
    """
    if path.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        content = mangle_bytes(content, mangle_packed) if mangle_packed else content
    for old in (path, f"{path}.lines"):  # overwriting a file would flush it to the disk at once
        if os.path.exists(old):
            os.remove(old)
    with open(path, "wb") as file:
        file.write(content)
    return path


# ---------------------------------------------------------------- folders of models and indices

# Python values that no part of a checkpoint or state expects
ODD_VALUES = [None, True, -1, 3, 10 ** 30, float("nan"), "x", [], {}, [None], {"a": 1},
              torch.zeros(0), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)]


def mangle_saved(path, rng):
    """Mangle a file of torch.save: a value in it, or its bytes."""
    if rng.random() < 0.2:
        mangle_file(path, rng)
        return
    with torch.serialization.safe_globals([Namespace]):
        saved = torch.load(path, weights_only=True)
    holder = [saved]
    places = list_places(holder)
    # each kind of place has the same chance, however many weights there are
    parts = {}
    for parent, key in places:
        parts.setdefault(key if isinstance(key, str) and "." not in key else "", []).append(
            (parent, key))
    parent, key = rng.choice(parts[rng.choice(list(parts))])
    if rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(ODD_VALUES)
    torch.save(holder[0] if holder else None, path)


def mangle_file(path, rng):
    """Mangle a file and write it back."""
    with open(path, "rb") as file:
        content = file.read()
    is_json = path.endswith(".json") and content.lstrip()[:1] in (b"{", b"[")
    if is_json:
        content = rng.choice([mangle_json, mangle_json, mangle_bytes])(content, rng)
    else:  # mangle the header: a wrong number in an array cannot be noticed
        beginning = 128 if path.endswith(".npy") else rng.choice([40, 400, len(content)])
        content = mangle_bytes(content[:beginning], rng) + content[beginning:]
    with open(path, "wb") as file:
        file.write(content)


def make_reader(folder):
    conftest.make_t5(folder, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1,
                     num_decoder_layers=1)
    (folder / "args.json").write_text(json.dumps({"num_contexts": 2, "max_length": 20}))


def make_old_reader(folder):
    """Make the folder of a reader whose weights are in a .bin file."""
    make_reader(folder)
    model = FiDT5.from_pretrained(folder)
    torch.save(model.t5.state_dict(), folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")


def make_retriever(folder):
    """Make a sentence-transformers folder with a head, and train_dense.py's args.json."""
    bert = conftest.make_bert(folder, num_hidden_layers=1)
    tokenizer = load_tokenizer(bert, "")
    model = BiEncoder.open(bert)
    model.query_encoder.head = torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.LayerNorm(4))
    model.save_pretrained(folder, 64)
    tokenizer.save_pretrained(folder)
    info = {"retriever": {"metric": "ip", "temperature": 0.5, "separator": 3}, "args": {}}
    (folder / "args.json").write_text(json.dumps(info))


def make_ranker(folder):
    CrossEncoder.open(conftest.make_bert(folder, num_hidden_layers=1)).save_pretrained(folder)


def open_reader(path):
    reader = FiDT5.from_pretrained(path).eval()
    tokenizer = load_tokenizer(path, "tokenizer")
    reader.check_tokenizer(tokenizer)
    read_training_args(path)
    reader.generate(pack_passages([tokenizer(["the a"])["input_ids"]], 0), 3)


def make_causal_reader(folder):
    causal_helpers.make_causal(folder, num_hidden_layers=1, hidden_size=16)
    prompts = {"prompt_template": "{text} {question}", "passage_weights": "score",
               "retriever_temperature": 0.5}
    info = {"num_contexts": 2, "max_length": 20, "prompts": prompts}
    (folder / "args.json").write_text(json.dumps(info))


def open_causal_reader(path):
    reader = readers.open_reader(path).eval()
    tokenizer = load_tokenizer(path, "tokenizer")
    reader.check_tokenizer(tokenizer)
    trained = read_training_args(path)
    reader.set_lengths(20, 3)
    record = {"id": "r", "question": "who wrote it", "ctxs": [{"text": "the a", "score": 1.0}]}
    collator = reader.make_collator(tokenizer, trained.get("num_contexts", 1), 20)
    batch = collator([(0, record, "a town")])
    assert reader(**batch["inputs"], labels=batch["labels"])[0].isfinite()
    reader.generate(**batch["inputs"], max_length=3)


def score_one(path):
    """Score a key as lm_score.py does."""
    args = lm_score_args(path)
    template = lm_score.TASK_TEMPLATES["qa"]
    jobs = [lm_score.Job({}, "who", ["the a"], ["a town"], template, "mangled")]
    config = read_config(path, "language")
    lm_score.score_jobs(lm_score.open_scorer(args, path, False, {}, config, ALONE), jobs, args)


def open_retriever(path):
    model = BiEncoder.open(path, trained=True).eval()
    tokenizer = load_tokenizer(path, "tokenizer")
    model.use_texts(Texts({"query": tokenizer, "key": tokenizer}))
    with torch.no_grad():
        model.encode(tokenizer(["who wrote it"])["input_ids"], "query")


def open_ranker(path):
    model = CrossEncoder.open(path, trained=True).eval()
    tokenizer = load_tokenizer(path, "tokenizer")
    model.use_texts(Texts({"query": tokenizer, "key": tokenizer}))
    rows = tokenizer(["who"], ["a town"], return_token_type_ids=True)
    with torch.no_grad():
        model([(rows["input_ids"][0], rows["token_type_ids"][0])])


def make_bm25(folder):
    """Make the index of three documents."""
    path = folder.parent / "towns.jsonl"
    path.write_text('{"text": "a river town"}\n{"text": "the baker"}\n{"text": "a letter"}\n')
    settings = SearchSettings("bm25", 3, index=str(folder))
    (folder / ".lock").touch()  # the folder is not empty
    bm25.open_bm25(settings, Corpus(str(path), "{text}"), ALONE)


def search_bm25(path):
    settings = SearchSettings("bm25", 3, index=str(path))
    index = bm25.BM25Index(open_index(path, 3), bm25.open_words("en", None, "bm25s"))
    questions = [make_question({"question": "river baker"}, "q", 0)]
    bm25.search_words(settings, index, questions, ALONE)


def make_vectors(folder):
    np.save(folder / "vectors.npy", np.ones((5, 8), np.float16))


def open_vectors(path):
    assert np.isfinite(open_array(path, "vectors")).all()


def make_faiss(folder):
    index = faiss.index_factory(8, "IVF2,Flat")
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(folder / "index.faiss"))


def make_table(folder):
    """Make a corpus with its kept table of lines."""
    path = folder / "corpus.jsonl"
    path.write_bytes(spell(DOCUMENTS))
    scanned = Corpus([str(path)], TEMPLATE).parts[0]
    os.utime(path, ns=(0, 0))  # a copy of the folder keeps it
    stamp = {"version": TABLE_VERSION, "file": describe_version(os.stat(path))}
    keep_table(f"{path}.table", stamp, scanned.starts, scanned.ids)


def read_kept_table(path):
    """Read a corpus whose table may be mangled, but not its documents."""
    if Path(path).read_bytes() == spell(DOCUMENTS):
        assert read_whole_corpus(path) == len(DOCUMENTS)


def make_run(out, resume):
    """Make a run, as training/resume.py needs it, with a model of two numbers."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer, scheduler = make_optimizer(model, 1e-3, 0.01, 1e-8, 2, 9)
    args = Namespace(resume=resume, seed=0, lr=1e-3)
    return SimpleNamespace(unwrapped=model, optimizer=optimizer, scheduler=scheduler, world=ALONE,
                           dataset_sizes=[3], out=out, args=args, flags=vars(args),
                           inputs={"r.json": "9:ab"}, progress=Progress())


def take_step(run):
    run.unwrapped(torch.ones(3, 2)).sum().backward()
    run.optimizer.step()
    run.scheduler.step()
    run.progress.count_update(1.5, 2, 3.0, 0.5)


def make_state(folder):
    run = make_run(f"{folder}/run", resume=False)
    take_step(run)
    take_step(run)
    save_state(run)


def resume_run(path):
    run = make_run(f"{path}/run", resume=True)
    state = load_state(run.out, run.flags, run.world, {"resume"}, run.inputs)
    run.progress = Progress(**state["progress"])
    restore_state(run, state)
    take_step(run)
    run.progress.summary()


def make_federation(path, resume):
    """Make a federation, as federated/server.py needs it, with a model of two numbers."""
    script = SimpleNamespace(FREE_FLAGS={"resume"})
    args = Namespace(resume=resume, strategy=["FedAdam"], min_clients=1, num_clients=2,
                     transport="float32", mode="retriever", rounds=10, total_rounds=10,
                     privacy=["DifferentialPrivacyServerSideAdaptiveClipping",
                              "noise_multiplier=0"])
    run = make_run(f"{path}/run", resume)
    strategy, noise_multiplier = make_strategy(args)
    return Server(args, SimpleNamespace(mode="retriever", script=script), run, strategy, None, True,
                  noise_multiplier, vars(args))


def make_federation_state(folder):
    server = make_federation(folder, False)
    server.strategy.strategy.m_t = {"weight": np.zeros((1, 2)), "bias": np.zeros(1)}
    save_federation(server)


def resume_federation(path):
    server = make_federation(path, True)
    restore_federation(server)
    save_federation(server)


# {name: (function that makes a whole folder, function that opens it, file that is opened or None)}
OPENERS = {
    "reader": (make_reader, open_reader, None),
    "old reader": (make_old_reader, open_reader, None),
    "causal reader": (make_causal_reader, open_causal_reader, None),
    "language model": (causal_helpers.make_causal, score_one, None),
    "retriever": (make_retriever, open_retriever, None),
    "ranker": (make_ranker, open_ranker, None),
    "minDPR's file": (lambda folder: mindpr_file(folder / "x"), open_retriever, "x/model"),
    "DPR's file": (lambda folder: dpr_file(folder / "x"), open_retriever, "x/model"),
    "BM25 index": (make_bm25, search_bm25, None),
    "vectors": (make_vectors, open_vectors, None),
    "faiss index": (make_faiss, lambda path: read_index(path, 100), "index.faiss"),
    "corpus's table": (make_table, read_kept_table, "corpus.jsonl"),
    "resume state": (make_state, resume_run, None),
    "federation's state": (make_federation_state, resume_federation, None),
}


def list_files(folder):
    """Return the paths of all files below a folder."""
    return sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder)
                  for name in names)


def open_mangled(opener, files, rng, outcomes):
    """Return [(opener, kind, message, file)] of the faults in how an opener opens mangled folders.

    In each folder one file is mangled. Right results are counted in outcomes.
    """
    make, read, opened = OPENERS[opener]
    make_folder = Path(f"whole {opener}")
    make_folder.mkdir()
    make(make_folder)
    folder, complaints = "mangled", []
    path = os.path.join(folder, opened) if opened else folder
    name = os.path.basename(path)
    for number in range(files + 1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(make_folder, folder)
        if number == 0:
            assert complain(read, path, name, None) is None, opener
            continue
        mangled = rng.choice(list_files(folder))
        is_saved = os.path.basename(mangled) in ("model", "run.state", "pytorch_model.bin")
        if is_saved:
            mangle_saved(mangled, rng)
        else:
            mangle_file(mangled, rng)
        complaint = complain(read, path, name, None, outcomes)
        if complaint:
            complaints.append((opener, *complaint, f"{mangled} of file {number}"))
    return complaints


def test_openers_open_mangled_folders_or_refuse_them_in_one_line(work_folder):
    complaints = []
    conftest.make_bert(work_folder / "tokenizer")
    for opener in OPENERS:
        complaints += open_mangled(opener, FOLDERS, random.Random(opener), Counter())
    expect_no_complaints(complaints)


# ---------------------------------------------------------------- files of another kind, flags

def refuse(message, function, *args):
    """Check that the function refuses the arguments with this message, in one line."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_of_another_kind_are_called_what_they_are(work_folder, tiny, monkeypatch):
    make_state(work_folder)
    (work_folder / "run.jsonl").write_text('{"epoch": 0}\n')
    for function in (FiDT5.from_pretrained, read_training_args, BiEncoder.open):
        refuse("run.state: is a run's resume state", function, "run.state")
        refuse("run.jsonl: holds text", function, "run.jsonl")
    refuse("NO_SUCH_FOLDER: no such folder or file", load_tokenizer, "NO_SUCH_FOLDER", tiny)
    monkeypatch.setattr("training.resume.gather_lists", lambda items, world: items)
    two = make_run("run", resume=True)
    two.world = World(0, 0, 2, torch.device("cpu"))
    refuse("run.state is from a run of 1 process(es), this one has 2; start 1 again, or give "
           "--overwrite", load_state, "run", two.flags, two.world, set(), {})


def test_models_that_no_machine_can_hold_are_refused_at_once(work_folder, tiny):
    config = json.load(open(f"{tiny}/config.json"))
    for name in ("num_layers", "d_model", "vocab_size"):
        (work_folder / "config.json").write_text(json.dumps(config | {name: 10 ** 9}))
        with time_limit(2):
            refuse(f"config.json sets {name} 1000000000", FiDT5.from_pretrained, ".")


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "dropout_rate"])
def test_a_dropout_that_is_no_rate_is_refused(work_folder, tiny, name):
    config = json.load(open(f"{tiny}/config.json"))
    for value in ("NaN", "1.5", "-0.5"):
        text = json.dumps(config | {name: HOLE}).replace(f'"{HOLE}"', value)
        (work_folder / "config.json").write_text(text)
        refuse(f"config.json sets {name} {value.lower()}", read_config, ".")


def test_a_folders_own_code_is_not_offered_to_be_run(work_folder, monkeypatch):
    """transformers would ask on the terminal, and run the code if a pipe answers yes."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(conftest.make_bert(work_folder / "model"))
    (folder / "own.py").write_text("open('executed', 'w')\n"
                                   "from transformers import BertConfig as Own\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    refuse("custom code", read_config, str(folder))
    assert not os.path.exists("executed")


def test_a_tokenizer_larger_than_the_model_is_refused(work_folder):
    tokenizer = load_tokenizer(conftest.make_bert(work_folder / "large"), "")
    small = conftest.make_bert(work_folder / "small", vocab_size=20)
    for kind in (BiEncoder, CrossEncoder):
        refuse("the tokenizer has 88 ids, the model embeds 20", kind.open(small).use_texts,
               Texts({"query": tokenizer, "key": tokenizer}))


@pytest.mark.parametrize("flag, value", [
    ("lr", "nan"), ("lr", "inf"), ("weight_decay", "nan"), ("weight_decay", "-5"), ("clip", "nan"),
    ("dropout", "nan"), ("seed", str(2 ** 64)), ("seed", "-1")])
def test_numbers_that_cannot_be_trained_with_are_refused(flag, value, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "OUT", "a", "b", f"--{flag}", value])
    refuse(f"--{flag} must be", train_epoch.check_args, train_epoch.parse_args())
    monkeypatch.setattr("sys.argv", ["x", "--output_dir", "o", "--train_data", "a", f"--{flag}",
                                     value])
    refuse(f"--{flag} must be", dense.flags.check_retriever_flags,
           dense.flags.parse_retriever_flags(""))


@pytest.mark.parametrize("flag, value", [("k1", "nan"), ("b", "-1"), ("seed", "-1"),
                                         ("fusion_weights", "nan"), ("query_max_length", "0")])
def test_numbers_that_cannot_be_retrieved_with_are_refused(flag, value, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--corpus", "c", "--eval_data", "q", f"--{flag}", value])
    args = retrieval.flags.parse_retrieve_flags("")
    refuse(f"--{flag} must be", retrieval.flags.check_retrieve_flags, args)
