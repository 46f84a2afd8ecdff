"""Results: earlier runs read back, reader records written, fusion by hand."""
import gzip
import json

import pytest

from records.corpus import Corpus
from records.questions import make_question, read_questions
from retrieval.results import (
    Results,
    RunLine,
    fuse,
    rank_scores,
    rank_unscored_last,
    read_run,
    write_contexts,
    write_run,
)
from retrieval_helpers import make_questions, make_results, write_corpus
from utils import InputError


@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")


def test_contexts_without_a_score_come_last():
    """A22: test.py --scores leaves contexts that its reader has not read without a score."""
    lines = [RunLine("q", str(i), score, "f:1") for i, score in enumerate([-7.0, None, -9.5, None])]
    ranked = sorted(rank_unscored_last(lines), key=lambda line: -line.score)
    assert [line.document_id for line in ranked] == ["0", "2", "1", "3"]
    unscored = [line._replace(score=None) for line in lines]
    assert [line.score for line in rank_unscored_last(unscored)] == [0, -1, -2, -3]


def test_a_run_without_scores_keeps_its_order(corpus, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps([
        {"id": "a", "question": "q",
         "ctxs": [{"id": "d5"}, {"id": "d2", "score": None}, {"id": "d7"}]},
        {"id": "b", "question": "q",
         "ctxs": [{"id": "d1", "score": "0.5"}, {"id": "d3", "score": 2}]}]))
    questions = make_questions({"id": "b", "question": "q"}, {"id": "a", "question": "q"},
                               {"id": "c"})
    results = read_run(path, questions, corpus)
    assert [results.row(i)[0] for i in range(3)] == [[3, 1], [5, 2, 7], []]
    logged = []
    read_run(path, questions, corpus, logged.append)
    assert logged == [f"note: {path} has documents for 2 of the 3 questions"]
    with pytest.raises(InputError, match="no document for any of the questions .*'x'"):
        read_run(path, make_questions({"id": "x"}), corpus)
    path.write_text(json.dumps([{"id": "a", "question": "another", "ctxs": [{"id": "d5"}]}]))
    message = "record 0: question 'a' is 'another' here and 'q' in the questions"
    with pytest.raises(InputError, match=message):
        read_run(path, questions, corpus)
    for bad in ({"score": 1}, "d1", {"id": "d1", "score": "high"}):
        path.write_text(json.dumps([{"id": "a", "question": "q", "ctxs": [bad]}]))
        with pytest.raises(InputError, match=r"record 0: ctxs\[0\]"):
            read_run(path, questions, corpus)


def test_a_trec_run_is_read_back(corpus, tmp_path):
    path, questions = tmp_path / "run", make_questions({}, {})
    write_run(path, questions, make_results([3, 1], [2, -1]), corpus, "name")
    assert path.read_text().splitlines()[0] == "0 Q0 d3 1 0 name"
    results = read_run(path, questions, corpus)
    assert [results.row(i)[0] for i in range(2)] == [[3, 1], [2]]
    for text, message in (("0 Q0 d9 1 1.0 x\n", "run:1: document 'd9' is not in the corpus"),
                          ("\n0 Q0 d1 1\n", "run:2: not a line of a TREC run")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_run(path, questions, corpus)


def test_contexts_of_both_forms(corpus, tmp_path):
    questions, results = make_questions({"id": "a"}, {"id": "b"}), make_results([3, 1], [2, -1])
    write_contexts(tmp_path / "out.json", questions, results, corpus, [[True, False], None])
    write_contexts(tmp_path / "out.jsonl", questions, results, corpus, [[True, False], None])
    records = json.loads((tmp_path / "out.json").read_text())
    assert records == [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert [[c["id"] for c in record["ctxs"]] for record in records] == [["d3", "d1"], ["d2"]]
    assert [c.get("has_answer") for c in records[0]["ctxs"]] == [True, False]
    assert records[1]["ctxs"] == [{"id": "d2", "title": "t2", "text": "text 2", "score": 0.0}]


def test_scores_of_what_a_record_keeps_are_kept(corpus, tmp_path):
    for fields in ({"pos": ["a"]}, {"positive_ctxs": [{"text": "a"}]}, {}):
        questions = make_questions({"teacher_scores": [1.0], **fields})
        write_contexts(tmp_path / "out.jsonl", questions, make_results([3]), corpus, [None])
        record = json.loads((tmp_path / "out.jsonl").read_text())
        assert ("teacher_scores" in record) == bool(fields)


def test_gzipped_outputs_open(corpus, tmp_path):
    question = make_question({"id": "7", "question": "who"}, "f:1", 0)
    write_contexts(tmp_path / "out.json.gz", [question], make_results([3]), corpus, [None])
    with gzip.open(tmp_path / "out.json.gz", "rt") as file:
        assert json.load(file)[0]["ctxs"][0]["id"] == "d3"
    assert read_questions(tmp_path / "out.json.gz")[0].id == "7"


def test_fusion_by_hand():
    a, b = rank_scores([{1: 9.0, 2: 5.0, 3: 1.0}],
                             5), rank_scores([{3: 0.2, 4: 0.1}], 5)
    doc_indices, scores = fuse([a, b], "rrf", [1, 1], 5).row(0)
    assert doc_indices == [3, 1, 2, 4] and scores[0] == pytest.approx(1 / 63 + 1 / 61)
    doc_indices, scores = fuse([a, b], "weighted", [1, 2], 5).row(0)
    assert doc_indices == [3, 1, 2, 4] and scores == pytest.approx([2, 1, 0.5, 0])
    assert isinstance(a, Results)
