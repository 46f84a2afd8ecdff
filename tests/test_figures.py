"""One meaning per figure: ties, digits, relevance levels, regular expressions, own documents, and
the measures of a saved run, against trec_eval where it has them.
"""
import json
import random

import numpy as np
import pytest
import pytrec_eval
import torch

import retrieve
from dense.examples import qrels_examples
from dense.texts import TextSettings
from metrics import find_answers, has_answer
from reader.predict import Prediction, count_best_with_answer, describe_contexts, score_prediction
from records.corpus import Corpus
from records.questions import own_ids, read_questions
from retrieval.dev_set import make_annotated_set, measure_retriever
from retrieval.flags import parse_retrieve_flags
from retrieval.measures import measure_queries, note_patterns, trec_ranking
from retrieval.results import (
    drop_own,
    find_own,
    fuse,
    rank_scores,
    read_contexts,
    read_run,
    write_run,
)
from retrieval.search import DenseSettings, SearchSettings, note_missing
from retrieval_helpers import make_questions, make_results, write_corpus, write_rows
from utils import InputError, World, call_main

ALONE = World(0, 0, 1, torch.device("cpu"))
TREC_NAMES = {"recall": "recall", "ndcg": "ndcg_cut", "map": "map_cut", "success": "success",
              "precision": "P"}


@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")


def run_retrieve(*flags, code=0):
    """Run retrieve.py in this process."""
    args = parse_retrieve_flags("", [str(flag) for flag in flags])
    assert call_main(retrieve.main, args) == code


# ---------------------------------------------------------------- saved runs

def write_saved_run(folder):
    """Write run.trec and qrels.txt of 14 queries with ties, grades, queries that only one of the
    two has, and one without a relevant document.
    """
    rng = random.Random(5)
    run, qrels = {}, {}
    for i in range(14):
        if i != 3:
            documents = rng.sample(range(60), 30)
            run[f"q{i}"] = {f"d{d}": rng.choice([0.25, 0.5, rng.random()]) for d in documents}
        if i != 5:
            labels = [0, 1, 1, 2, 3] if i != 7 else [0]
            qrels[f"q{i}"] = {f"d{d}": rng.choice(labels) for d in rng.sample(range(70), 20)}
    write_rows(folder / "run.trec", [f"{query} Q0 {d} 0 {score!r} x" for query in run
                                     for d, score in run[query].items()])
    write_rows(folder / "qrels.txt", [f"{query} 0 {d} {label}" for query, labels in qrels.items()
                                      for d, label in labels.items()])
    return run, qrels


@pytest.mark.parametrize("level", [1, 2])
def test_a_saved_run_is_measured_as_by_trec_eval(level, tmp_path, capsys):
    """Measure a run without a corpus: ties, missing queries, grades and levels, query by query."""
    run, qrels = write_saved_run(tmp_path)
    run_retrieve("--retrieval_method", "run", "--results", tmp_path / "run.trec", "--qrels",
                 f"qrels={tmp_path}/qrels.txt", "--metrics", *TREC_NAMES, "mrr", "--cutoffs", 1, 5,
                 10, 100, "--relevance_level", level, "--measures", tmp_path / "m.json",
                 "--measures_per_query", tmp_path / "m.jsonl")
    names = {f"{name}.1,5,10,100" for name in TREC_NAMES.values()} | {"recip_rank"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, names, relevance_level=level).evaluate(run)
    rows = {}
    for line in open(tmp_path / "m.jsonl"):
        row = json.loads(line)
        rows[row.pop("query")] = row
    assert set(rows) == set(qrels) and set(expected) == set(qrels) - {"q3"}
    for query, row in rows.items():
        theirs = expected.get(query)
        for name, trec_name in TREC_NAMES.items():
            for k in (1, 5, 10, 100):
                value = theirs[f"{trec_name}_{k}"] if theirs else 0
                assert row[f"{name}@{k}"] == pytest.approx(value, abs=1e-6), (query, name, k)
        assert row["mrr@100"] == pytest.approx(theirs["recip_rank"] if theirs else 0, abs=1e-6)
    means = json.load(open(tmp_path / "m.json"))
    assert means["queries"] == 13 and means["measured_queries"]["map"] == 13
    assert means["relevance_level"] == level
    assert means["ndcg@10"] == pytest.approx(sum(row["ndcg@10"] for row in rows.values()) / 13)
    logged = capsys.readouterr().out
    assert "has documents for 12 of the 13 questions" in logged
    assert f"1 of 13 labelled queries have no document with a label of {level} or more" in logged


def test_a_run_needs_passages_where_texts_are_looked_at(tmp_path, capsys):
    write_saved_run(tmp_path)
    common = ["--retrieval_method", "run", "--results", tmp_path / "run.trec"]
    run_retrieve(*common, "--qrels", f"qrels={tmp_path}/qrels.txt", "--metrics", "nq", code=1)
    run_retrieve(*common, "--eval_data", tmp_path / "qrels.txt", "--metrics", "map", code=1)
    assert capsys.readouterr().err.count("need the passages: give --corpus") == 2
    run_retrieve(*common, tmp_path / "run.trec", "--metrics", "map", "--qrels", "qrels=x", code=1)
    assert "takes one file of --results" in capsys.readouterr().err


def test_measures_per_query_in_lines(tmp_path):
    write_saved_run(tmp_path)
    run_retrieve("--retrieval_method", "run", "--results", tmp_path / "run.trec", "--qrels",
                 f"qrels={tmp_path}/qrels.txt", "--metrics", "mrr", "--cutoffs", 5, 10,
                 "--measures_per_query", tmp_path / "m.tsv")
    lines = (tmp_path / "m.tsv").read_text().splitlines()
    assert lines[0] == "query\tmeasure\tvalue" and len(lines) == 1 + 13 * 2
    assert lines[1].startswith("q0\tmrr@5\t")


# ---------------------------------------------------------------- digits

def test_a_run_that_is_read_again_has_the_same_ranking(corpus, tmp_path):
    """Scores that differ in the seventh decimal are not ties, in runs and in ctxs."""
    scores = {6: 0.1234567, 1: 0.1234566, 4: 0.12345655, 3: 1e-9, 2: 1e-10}
    questions, results = make_questions({"id": "q"}), rank_scores([scores], 8)
    assert results.row(0)[0] == [6, 1, 4, 3, 2]
    write_run(tmp_path / "run", questions, results, corpus, "x")
    again = read_run(tmp_path / "run", questions, corpus)
    assert np.array_equal(again.indices[0, :5], results.indices[0])
    assert np.array_equal(again.scores[0, :5], results.scores[0])
    contexts = read_contexts(results, 0, corpus, None)
    assert [np.float32(context["score"]) for context in contexts] == results.scores[0].tolist()
    assert contexts[0]["score"] == 0.123456702


def test_fused_scores_are_ranked_as_they_are_written(corpus, tmp_path):
    """rrf's sums are ranked as float32, as in runs and in trec_eval."""
    rng = random.Random(0)
    parts = [rank_scores([{d: rng.random() for d in rng.sample(range(8), 7)}], 8)
             for _ in range(3)]
    fused = fuse(parts, "rrf", [1, 1, 1], 8)
    write_run(tmp_path / "run", make_questions({"id": "q"}), fused, corpus, "x")
    again = read_run(tmp_path / "run", make_questions({"id": "q"}), corpus)
    assert again.row(0) == fused.row(0)
    values = {1: 0.1, 2: 0.1 + 1e-12}  # equal as float32: by index
    assert rank_scores([values], 8).row(0)[0] == [1, 2]


# ---------------------------------------------------------------- one order of ties

class FixedScores(torch.nn.Module):
    """Encode a text as the vector of the numbers that it spells."""
    metric = "ip"

    def encode(self, texts, role):
        if role == "query":
            return torch.ones(len(texts), 1)
        return torch.tensor([[float(text)] for text in texts])

    def score(self, queries, keys):
        return queries @ keys.T


class PlainCollator:
    settings = TextSettings()

    def queries(self, texts, tasks):
        return texts

    keys = queries


@pytest.mark.parametrize("method", ["annotated", "retrieval"])
def test_both_scripts_rank_ties_as_trec_eval(method, tmp_path):
    """Documents with equal scores are ranked by falling id, also beyond the cutoff."""
    rows = [{"_id": f"{i:02d}", "text": "0.5" if 3 <= i < 18 else str(i / 100)} for i in range(24)]
    corpus = Corpus(write_rows(tmp_path / "c.jsonl", rows), "{text}")
    qrels = {"q": {"17": 1, "04": 2, "16": 1, "23": 1, "03": 0}}
    run = {f"{i:02d}": float(rows[i]["text"]) for i in range(24)}
    if method == "annotated":
        run = {name: run[name] for name in qrels["q"]}
    dev = make_annotated_set(qrels, corpus, {"q": "q"}, None)._replace(method=method)
    ours = measure_retriever(FixedScores(), dev, PlainCollator(), corpus,
                             ["ndcg", "mrr", "recall"], [3], ALONE)
    names = {"ndcg_cut.3", "recall.3", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate({"q": run})["q"]
    assert ours["ndcg@3"] == pytest.approx(theirs["ndcg_cut_3"])
    assert ours["recall@3"] == pytest.approx(theirs["recall_3"])
    assert ours["mrr@3"] == pytest.approx(theirs["recip_rank"]) == 1
    results = rank_scores([{i: score for i, score in enumerate(run.values())}], 24)
    if method == "retrieval":  # retrieve.py's measures are the same
        questions = make_questions({"id": "q"})
        labels = [{int(name): label for name, label in qrels["q"].items()}]
        row, = measure_queries(questions, results, labels, None, corpus, ["ndcg", "mrr"], [3])
        assert row["ndcg@3"] == pytest.approx(ours["ndcg@3"])
        assert trec_ranking(*results.row(0), corpus)[:3] == [17, 16, 15]


# ---------------------------------------------------------------- absent queries and documents

def test_absent_queries_and_documents_are_said_in_both_scripts(corpus, tmp_path, capsys):
    """Records that are left out of a mean, or of the training, are counted and named."""
    qrels = {"q1": {"d1": 1, "gone": 1}, "q2": {"lost": 1, "d2": 1}, "q9": {"d3": 1}}
    write_rows(tmp_path / "qrels", [f"{query} 0 {document} 1" for query in qrels
                                    for document in qrels[query]])
    write_rows(tmp_path / "q.jsonl", [{"_id": "q1", "text": "text 1"}, {"_id": "q2", "text": "x"}])
    run_retrieve("--retrieval_method", "random", "--corpus", corpus.parts[0].path, "--queries",
                 tmp_path / "q.jsonl", "--qrels", f"qrels={tmp_path}/qrels", "--metrics", "recall",
                 "--cutoffs", 8, "--measures", tmp_path / "m.json")
    of_queries = ("note: 1 of 3 judged queries are not among the queries (first: 'q9'); the means "
                  "are over the other 2")
    of_documents = ("note: 2 of 4 labelled documents are not in the corpus (first: 'gone'); they "
                    "count as not found")
    logged = capsys.readouterr().out.splitlines()
    assert of_queries in logged and of_documents in logged
    assert json.load(open(tmp_path / "m.json"))["recall@8"] == 0.5
    # train_dense.py's evaluation
    logged = []
    queries = {"q1": "0.1", "q2": "0.2"}
    dev = make_annotated_set(qrels, corpus, queries, None, log=logged.append)
    assert logged == [of_queries, of_documents]
    texts = type("Texts", (), {"text": lambda self, i: "0.5", "ids": corpus.ids})()
    values = measure_retriever(FixedScores(), dev, PlainCollator(), texts, ["recall"], [8], ALONE)
    assert values == {"recall@8": 0.5}
    # and its training
    logged = []
    examples = qrels_examples(corpus, queries, qrels, {"q1": {"d5": 0}}, "qrels=F", logged.append)
    assert [(example.pos, example.neg) for example in examples] == [([1], [5]), ([2], [])]
    assert logged == ["note: qrels=F: 1 of 3 queries are in none of the query files (first: "
                      "'q9'); they are dropped",
                      "note: qrels=F: 2 of 4 labels are of documents that are not in the corpus "
                      "(first: 'gone'); they are dropped"]
    for absent, message in (({"q9": {"d1": 1}}, "none of the queries, such as 'q9'"),
                            ({"q1": {"no": 1}}, "none of the .*documents")):
        with pytest.raises(InputError, match=message):
            make_annotated_set(absent, corpus, queries, None)
        with pytest.raises(InputError, match=message):
            qrels_examples(corpus, queries, absent, {})


# ---------------------------------------------------------------- regular expressions

def test_answers_as_regular_expressions(tmp_path, capsys):
    """--match regex applies to nq, has_answer, mined positives and the page."""
    rows = ["id\ttext\ttitle", "1\tBuilt in 1904 by a firm.\tCrane", "2\tIt is the largest.\tLakes",
            "3\tHe ran 26.2  miles.\tRun"]
    path = write_rows(tmp_path / "c.tsv", rows)
    write_rows(tmp_path / "q.csv", ["When was it built?\t['(18|19)\\\\d\\\\d']",
                                    "How far did he run?\t['26(\\\\.2)?\\\\s+miles?', '(']"])
    common = ["--retrieval_method", "bm25", "--corpus", path, "--eval_data", tmp_path / "q.csv",
              "--metrics", "nq", "collate_pos", "--cutoffs", 1, "--index", tmp_path / "index",
              "--measures", tmp_path / "m.json", "--save_name", "x"]
    run_retrieve(*common, "--match", "regex", "--output", tmp_path / "out.jsonl", "--html",
                 tmp_path / "page.html")
    assert json.load(open(tmp_path / "m.json"))["nq@1"] == 1
    mined = [json.loads(line) for line in open(tmp_path / "q.pos.x.json")]
    assert [row["positive_ctxs"][0]["passage_id"] for row in mined] == ["1", "3"]
    logged = capsys.readouterr().out
    assert "1 answers are malformed regular expressions and match nothing; the first is" in logged
    run_retrieve(*common)
    assert json.load(open(tmp_path / "m.json"))["nq@1"] == 0
    assert find_answers("é 26.2 miles, 26 mile", [r"26(\.2)?\s+miles?", "("], True) == [(2, 12),
                                                                                    (14, 21)]
    assert not has_answer("text", ["(", "["], is_regex=True)
    logged = []
    note_patterns([["fine"]], ["f:1"], logged.append)
    assert logged == []


def test_predictions_are_matched_by_patterns():
    """test.py --match regex scores as DrQA does, and marks contexts by the same patterns."""
    def score(text, **more):
        patterns = [r"(18|19)\d\d", "("]
        prediction = score_prediction(0, text, patterns, [1.0, 2.0], False, None, **more)
        return prediction.em, prediction.f1
    assert score("1904, it is said", is_regex=True) == (1, 1)
    assert score("in 1904", is_regex=True) == (0, 0) == score("1904")
    record = {"ctxs": [{"text": "x"}, {"text": "built in 1904"}], "answers": [r"19\d\d"]}
    marks = [[context["has_answer"] for context in describe_contexts(record, [1, 2], is_regex)
              ["contexts"]] for is_regex in (True, False)]
    assert marks == [[False, True], [False, False]]
    predictions = [Prediction(0, "1904", 1.0, 1.0, [1, 2])]
    assert count_best_with_answer(predictions, [record], is_regex=True) == (1, 1)


# ---------------------------------------------------------------- own documents

@pytest.mark.parametrize("method", ["bm25", "random", "run", "fuse"])
def test_a_querys_own_document_is_left_out(method, corpus, tmp_path, capsys):
    """--hits documents remain, in the run and in the measures."""
    write_rows(tmp_path / "q.jsonl", [{"_id": f"d{i}", "text": f"text {i} t{i}"} for i in (1, 2)]
               + [{"_id": "other", "text": "text 3"}])
    write_rows(tmp_path / "qrels", ["d1 0 d3 1", "d2 0 d2 1", "other 0 d3 1"])
    write_rows(tmp_path / "saved", [f"{query} Q0 d{i} {i} {9 - i} x" for i in range(8)
                                    for query in ("d1", "d2", "other")])
    more = {"run": ["--results", tmp_path / "saved"],
            "fuse": ["--results", tmp_path / "saved", tmp_path / "saved"]}.get(method, [])
    run_retrieve("--retrieval_method", method, *more, "--corpus", corpus.parts[0].path, "--queries",
                 tmp_path / "q.jsonl", "--qrels", f"qrels={tmp_path}/qrels", "--hits", 7,
                 "--index", tmp_path / "index", "--trec", tmp_path / "run", "--exclude_self",
                 "--metrics", "recall", "--cutoffs", 7, "--measures", tmp_path / "m.json")
    found = {}
    for line in open(tmp_path / "run"):
        query, _, document, *_ = line.split()
        found.setdefault(query, []).append(document)
    assert "d1" not in found["d1"] and "d2" not in found["d2"] and len(found["d1"]) == 7
    assert len(set(found["other"])) == 7
    count = "2 of 3" if method != "random" else "of 3 queries"
    assert count in capsys.readouterr().out
    if method != "random":
        assert json.load(open(tmp_path / "m.json"))["recall@7"] == pytest.approx(2 / 3)


def test_a_document_that_is_left_out_is_not_missed(capsys):
    """The note that an approximate search finds too little counts the documents that there are."""
    settings = SearchSettings("dense", 8, dense=DenseSettings("x", faiss_index_factory="IVF2,Flat"))
    questions = make_questions({}, {})
    results = make_results([0, 1, 2, 3, 4, 5, 6, -1], [0, 1, 2, 3, 4, 5, 6, -1])
    note_missing(settings, questions, results, 7, print)
    assert capsys.readouterr().out == ""
    note_missing(settings, questions, results, 8, print)
    assert "2 of 2 queries find fewer than 8 documents" in capsys.readouterr().out


def test_own_documents_of_a_saved_run_need_no_corpus(tmp_path, capsys):
    write_rows(tmp_path / "run", ["a Q0 a 1 3 x", "a Q0 b 2 2 x", "c Q0 b 1 2 x"])
    write_rows(tmp_path / "qrels", ["a 0 b 1", "c 0 b 1"])
    run_retrieve("--retrieval_method", "run", "--results", tmp_path / "run", "--qrels",
                 f"qrels={tmp_path}/qrels", "--metrics", "mrr", "--cutoffs", 1, "--exclude_self",
                 "--measures", tmp_path / "m.json")
    assert json.load(open(tmp_path / "m.json"))["mrr@1"] == 1
    assert "--exclude_self: 1 of 2 queries have" in capsys.readouterr().out


def test_own_documents_in_training_and_by_position(corpus, tmp_path):
    """--exclude_self in train_dense.py; a position is not an id of the question's own."""
    qrels = {"d1": {"d1": 1, "d3": 1}, "q": {"d2": 1}}
    dev = make_annotated_set(qrels, corpus, {"d1": "a", "q": "b"}, None, exclude_self=True)
    assert dev.own == [1, -1]
    texts = type("Texts", (list,), {"text": list.__getitem__, "ids": corpus.ids})
    texts = texts(["0.9" if i == 1 else str(i / 10) for i in range(8)])
    for method, recall in (("annotated", 0.75), ("retrieval", 0.0)):
        given = measure_retriever(FixedScores(), dev._replace(method=method), PlainCollator(),
                                  texts, ["recall"], [1], ALONE)
        assert given["recall@1"] == recall
    write_rows(tmp_path / "c.tsv", ["id\ttext", "0\ta", "1\tb"])
    numbered = Corpus(str(tmp_path / "c.tsv"), "{text}")
    write_rows(tmp_path / "q.jsonl", [{"question": "a"}, {"question": "b", "id": 1}])
    assert find_own(own_ids(read_questions(tmp_path / "q.jsonl")), numbered) == [-1, 1]
    kept = drop_own(make_results([3, 1, 2], [1, 2, -1]), [1, 1], 2)
    assert [kept.row(i)[0] for i in range(2)] == [[3, 2], [2]]
