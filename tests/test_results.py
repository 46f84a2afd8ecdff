"""Results: earlier runs read back, labels, given candidates, mined negatives, measures; bad ones told in one line."""
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

from collate import candidates, check_candidates, check_outputs, collate, number_candidates
from conftest import run
from corpus import Corpus, read_queries
from data import check_record
from results import Query, Results, make_query, measure, read_labels, read_questions, read_run, write_contexts
from utils import InputError


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": f"d{i}", "title": f"t{i}" if i else None, "text": f"text {i}"}) + "\n" for i in range(8)))
    return Corpus(str(path), "{title} {text}")


def asked(*records):
    return [make_query({"question": "who", **record}, i, f"f:{i}") for i, record in enumerate(records)]


def found(*rows):
    return Results(np.array(rows), -np.arange(len(rows[0]), dtype=np.float32) + np.zeros((len(rows), 1), np.float32))


def flags(**changed):
    return SimpleNamespace(**{"key_template": "{title} {text}", "max_neg_num": 9, "filter_answers": False, "metrics": [], "qrels": [], "trec": None,
                              "results": []} | changed)


def collated(tmp_path, kind, queries, results, corpus, own=False, labels=None, **changed):
    collate(kind, tmp_path / "out.json", queries, results, corpus, own, labels or [{}] * len(queries), flags(**changed))
    return [json.loads(line) for line in open(tmp_path / "out.json")]


def test_answers_of_every_form(tmp_path):
    trivia = {"answer": {"Value": "ROME", "Aliases": ["Rome", "Roma"]}}
    for record, answers in (({"answers": ["a"]}, ["a"]), ({"answer": "a"}, ["a"]), ({"answer": ["a", "b"]}, ["a", "b"]), ({}, []),
                            (trivia, ["Rome", "Roma"]), ({"answers": None, "answer": "a"}, ["a"]), ({"answer": 3}, []), ({"answer": True}, []),
                            ({"answers": ["a"], "answer": {}}, ["a"])):
        assert asked(record)[0].answers == answers == check_record({"question": "who", **record}, "f:1", 0)["answers"]
    assert check_record({"question": "who", **trivia}, "f:1", 0)["target"] == "Rome"
    for bad in ({"answers": "a"}, {"answer": [3]}, {"answer": {"Aliases": ["x"]}}):
        for read in (lambda: asked(bad), lambda: check_record({"question": "who", **bad}, "f:1", 0)):
            with pytest.raises(InputError, match="answer"):
                read()


def test_a_run_without_scores_keeps_its_order(corpus, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps([{"id": "a", "question": "q", "ctxs": [{"id": "d5"}, {"id": "d2", "score": None}, {"id": "d7"}]},
                                {"id": "b", "question": "q", "ctxs": [{"id": "d1", "score": "0.5"}, {"id": "d3", "score": 2}]}]))
    queries = asked({"id": "b", "question": "q"}, {"id": "a", "question": "q"}, {"id": "c"})
    result = read_run(path, queries, corpus)
    assert [result.row(i)[0] for i in range(3)] == [[3, 1], [5, 2, 7], []]
    said = []
    read_run(path, queries, corpus, said.append)
    assert said == [f"note: {path} has documents for 2 of the 3 questions"]
    with pytest.raises(InputError, match="no document for any of the questions .*'x'"):
        read_run(path, asked({"id": "x"}), corpus)
    path.write_text(json.dumps([{"id": "a", "question": "another", "ctxs": [{"id": "d5"}]}]))
    with pytest.raises(InputError, match="record 0: question 'a' is 'another' here and 'q' in the questions"):
        read_run(path, queries, corpus)
    for bad in ({"score": 1}, "d1", {"id": "d1", "score": "high"}):
        path.write_text(json.dumps([{"id": "a", "question": "q", "ctxs": [bad]}]))
        with pytest.raises(InputError, match=r"record 0: ctxs\[0\]"):
            read_run(path, queries, corpus)


def test_labels_of_absent_documents_count_as_not_found(corpus):
    """As in trec_eval: recall's denominator and nDCG's ideal have them."""
    import pytrec_eval
    qrels = {"0": {"d1": 1, "gone": 2, "lost": 1}, "1": {"d2": 1}}
    queries, said = asked({}, {}), []
    labels = read_labels(queries, qrels, corpus, said.append)
    assert said == ["note: 2 of 4 labelled documents are not in the corpus, 'gone' the first; they count as not found"]
    results = found([1, 3, 4], [5, 2, -1])
    got = measure(queries, results, labels, None, ["recall", "ndcg", "map"], [3])
    run_ = {str(i): {f"d{n}": -rank for rank, n in enumerate(results.row(i)[0])} for i in range(2)}
    want = pytrec_eval.RelevanceEvaluator({q: {d: int(s) for d, s in own.items()} for q, own in qrels.items()},
                                          {"recall.3", "ndcg_cut.3", "map_cut.3"}).evaluate(run_)
    for ours, theirs in (("recall@3", "recall_3"), ("ndcg@3", "ndcg_cut_3"), ("map@3", "map_cut_3")):
        assert got[ours] == pytest.approx(sum(row[theirs] for row in want.values()) / 2, abs=1e-6)
    with pytest.raises(InputError, match="none of the qrels' documents .*'gone'"):
        read_labels(queries, {"0": {"gone": 1}}, corpus, print)
    with pytest.raises(InputError, match="no document for any of the questions .*'7'.*'0'"):
        read_labels(queries, {"7": {"d1": 1}}, corpus, print)
    with pytest.raises(InputError, match="no document for any of the questions .*None.*'0'"):  # filters left nothing
        read_labels(queries, {}, corpus, print)


def test_what_the_outputs_need_is_checked_before_the_search(corpus):
    good = asked({"pos_index": [7], "pos": ["a"], "answers": ["b"]})
    check_outputs(good, [{7: 1}], corpus, flags(metrics=["map", "nq", "collate_neg"]))
    for record, labels, metrics, message in (
            ({}, {1: 1}, ["nq"], "nq cannot be measured"), ({}, {}, ["map"], "map cannot be measured"),
            ({"pos_index": [8]}, {8: 1}, ["map"], "8 is the number of no document"), ({"pos_index": ["d1"]}, {}, ["collate_neg"], "'d1' is the number"),
            ({"positive_ctxs": [{"text": "x"}]}, {}, ["collate_neg"], r"the columns of --key_template '{name}' \('name'\)")):
        with pytest.raises(InputError, match=message):
            check_outputs(asked(record), [labels], corpus, flags(metrics=metrics, key_template="{name}"))
    check_outputs(asked({"pos_index": ["d1"]}), [{}], corpus, flags(metrics=["collate_key"]))
    for record, message in (({"pos_index": 3}, "'pos_index' must be a list"), ({"pos": "text"}, "'pos' must be a list"),
                            ({"task": ["qa"]}, "'task' must be a text")):
        with pytest.raises(InputError, match=f"f:0: {message}"):
            asked(record)
    twice = asked({"id": "1"}, {"id": 1})
    check_outputs(twice, [{}, {}], corpus, flags())
    for changed in ({"trec": "x"}, {"results": ["x"]}, {"qrels": ["x"]}):
        with pytest.raises(InputError, match="two questions have the id '1'"):
            check_outputs(twice, [{}, {}], corpus, flags(**changed))
    with pytest.raises(InputError, match="cannot hold the question id 'a b'"):
        check_outputs(asked({"id": "a b"}), [{}], corpus, flags(trec="x"))


def test_given_candidates_need_numbers_where_documents_are_written(corpus):
    good = {"pos": ["a"], "pos_index": [3], "neg": ["b"], "neg_index": [1]}
    check_candidates(asked(good), corpus, "{text}", True)
    assert number_candidates(asked(good), found([1, 0])).row(0)[0] == [1, 3]
    assert candidates({"pos": ["a"], "neg": ["b"], "neg_index": [1]}) == (["a", "b"], None)
    check_candidates(asked({"pos": ["a"], "neg": ["b"]}), None, "{text}", False)
    both = {"pos": ["a"], "neg": ["b"], "key": ["b", "a"]}
    assert candidates(both)[0] == ["b", "a"] and candidates(both, scored=True)[0] == ["a", "b"]  # what teacher_scores are of
    assert candidates({"key": ["b", "a"]}, scored=True)[0] == ["b", "a"]
    assert candidates({"history": None, "key": None, "pos": ["a"], "pos_index": [4]}) == (["a"], [4])
    assert candidates({"history": ["a", "b"], "teacher_scores": [1, 2]}) == (["a", "b"], None)  # LLM-Embedder's chat
    with pytest.raises(InputError, match="no question has candidates"):
        check_candidates(asked({}, {"pos": []}), None, "{text}", False)
    for bad, message in (({"pos": ["a"], "neg": ["b"]}, "not every candidate"), ({**good, "neg_index": [8]}, "8 is the number of no document"),
                         ({**good, "neg_index": ["d1"]}, "'d1' is the number"), ({"key": ["a", "b"], "key_index": [1]}, "not every candidate"),
                         ({"key": [3], "key_index": [1]}, "neither a text nor"), ({"key": "a"}, "'key' must be a list"),
                         ({"key": [{"title": "x"}], "key_index": [1]}, r"--key_template '{text}' \('text'\)")):
        with pytest.raises(InputError, match=f"question '0': .*{message}"):
            check_candidates(asked(bad), corpus, "{text}", True)


def test_collated_candidates_keep_their_texts(tmp_path):
    """Without numbers of their own they get none: places are no documents."""
    queries = asked({"key": ["a", {"text": "b"}, "c"]}, {"key": ["a", "b", "c"], "key_index": [7, 5, 6]})
    ranked = found([2, 0, 1], [1, 2, 0])
    rows = collated(tmp_path, "collate_key", queries, ranked, None, own=True)
    assert rows[0]["key"] == ["c", "a", "b"] and "key_index" not in rows[0]
    assert rows[1]["key"] == ["b", "c", "a"] and rows[1]["key_index"] == [5, 6, 7]
    rows = collated(tmp_path, "collate_score", queries, ranked, None, own=True)
    assert rows[0]["teacher_scores"] == [-1, -2, 0] and rows[1]["teacher_scores"] == [-2, 0, -1]


def test_positives_are_never_mined(corpus, tmp_path):
    hits = found([0, 1, 2, 3, 4, 5])
    for record, labels, left in (({"pos": ["t1 text 1"]}, {}, [0, 2, 3, 4, 5]), ({"pos": [{"title": "t2", "text": "text 2"}]}, {}, [0, 1, 3, 4, 5]),
                                 ({"pos_index": [4], "pos": ["other"]}, {}, [0, 1, 2, 3, 5]), ({}, {3: 1, 5: 0, -2: 1}, [0, 1, 2, 4, 5]),
                                 ({"answers": ["Text 4"]}, {}, [0, 1, 2, 3, 5])):
        row, = collated(tmp_path, "collate_neg", asked(record), hits, corpus, labels=[labels], filter_answers=True)
        assert row["neg_index"] == left and row["neg"] == [corpus.text(number) for number in left]


def test_mined_negatives_of_dpr_records_are_dpr_records(corpus, tmp_path):
    """train_dense.py reads them as it reads DPR's own."""
    from dense_data import read_examples
    record = {"positive_ctxs": [{"title": "other", "text": "words", "passage_id": "d2"}, {"title": "t1", "text": "text 1"}],
              "hard_negative_ctxs": [{"title": "old", "text": "old"}]}
    row, = collated(tmp_path, "collate_neg", asked(record), found([1, 2, 0, 5]), corpus, max_neg_num=1)
    assert row["hard_negative_ctxs"] == [{"title": "", "text": "text 0", "passage_id": "d0"}] and "neg" not in row
    assert read_examples(tmp_path / "out.json")[0].neg == row["hard_negative_ctxs"]
    row, = collated(tmp_path, "collate_neg", asked(record | {"key": ["a", "t1 text 1", "c"]}), found([2, 1, 0]), None, own=True)  # ranked
    assert row["hard_negative_ctxs"] == [{"title": "", "text": "c"}, {"title": "", "text": "a"}]


def test_passages_of_other_columns(corpus, tmp_path):
    assert corpus.text(0) == "text 0" and corpus.passage(0)["title"] == ""  # a title that is null
    (tmp_path / "pyserini.jsonl").write_text('{"id": "1", "contents": "all"}\n{"id": "2", "contents": "more"}\n')
    assert Corpus(str(tmp_path / "pyserini.jsonl"), "{contents}").passage(1) == {"id": "2", "title": "", "text": "more"}
    (tmp_path / "own.jsonl").write_text('{"id": "1", "name": "n", "body": "b"}\n')
    assert Corpus(str(tmp_path / "own.jsonl"), "{name}: {body}").passage(0)["text"] == "n: b"
    (tmp_path / "pyserini.jsonl").write_text('{"id": "1", "contents": "all"}\n{"id": "2"}\n')
    with pytest.raises(InputError, match="pyserini.jsonl:2: no column 'contents'"):
        Corpus(str(tmp_path / "pyserini.jsonl"), "{contents}")


def test_gzipped_outputs_open(corpus, tmp_path):
    write_contexts(tmp_path / "out.json.gz", [Query({}, "7", "who", "", [])], found([3]), corpus, [None])
    with gzip.open(tmp_path / "out.json.gz", "rt") as file:
        assert json.load(file)[0]["ctxs"][0]["id"] == "d3"
    assert read_questions(tmp_path / "out.json.gz")[0].id == "7"


def test_lines_are_cut_at_line_ends_only(tmp_path):
    """U+2028 and U+0085 are letters of a text; a mark of the encoding at the start is none."""
    (tmp_path / "r.json").write_text("\ufeff" + '{"question": "a\u2028b\u0085c"}\n{"question": "d"}\n')
    assert [query.text for query in read_questions(tmp_path / "r.json")] == ["a\u2028b\u0085c", "d"]
    (tmp_path / "q.tsv").write_text("\ufeffqid\tquery\n7\twho\n")
    assert [query[1:3] for query in read_questions(tmp_path / "q.tsv")] == [("7", "who")]
    assert read_queries([tmp_path / "q.tsv"]) == {"7": "who"}
    (tmp_path / "c.tsv").write_text("\ufeffid\ttext\ttitle\n1\ta\tb\n")
    (tmp_path / "c.json").write_text('\ufeff[{"id": "1", "text": "a", "title": "b"}]')
    for name in ("c.tsv", "c.json"):
        assert Corpus(str(tmp_path / name), "{text}").passage(0) == {"id": "1", "title": "b", "text": "a"}
    (tmp_path / "q.csv").write_text("question\tanswers\nwho\t['a']\n")
    assert [query.answers for query in read_questions(tmp_path / "q.csv")] == [["a"]]
    (tmp_path / "q.tsv").write_text("7\twho\n7\twhat\n")
    with pytest.raises(InputError, match="q.tsv:2: the id '7' is another query's"):
        read_queries([tmp_path / "q.tsv"])


def test_cutoffs_above_the_hits_are_left_out(corpus, tmp_path):
    (tmp_path / "q.json").write_text('{"question": "text 1", "pos_index": [1]}\n{"question": "text 2"}\n')
    common = ["--retrieval_method", "bm25", "--corpus", corpus.parts[0].path, "--eval_data", tmp_path / "q.json", "--metrics", "recall"]
    stdout, _ = run("retrieve.py", *common, "--hits", 2, "--measures", tmp_path / "m.json", "--cutoffs", 1, 2, 5)
    assert "note: --hits 2 leaves out the --cutoffs above it" in stdout
    assert "note: recall is the mean over the 1 of 2 questions that have labels" in stdout
    assert set(json.load(open(tmp_path / "m.json"))) == {"method", "queries", "recall@1", "recall@2"}
    stdout, _ = run("retrieve.py", *common, "--hits", 9, "--cutoffs", 100)  # all eight documents are ranked
    assert "leaves out" not in stdout and "@100" in stdout


def test_long_cells_are_read(tmp_path):
    (tmp_path / "long.tsv").write_text("id\ttext\ttitle\n1\t" + "word " * 40_000 + "\tit\n")
    assert len(Corpus(str(tmp_path / "long.tsv"), "{text}").text(0)) == 199_999
    (tmp_path / "q.csv").write_text("q" * 200_000 + "\t['a']\n")
    assert len(read_questions(tmp_path / "q.csv")[0].text) == 200_000


@pytest.mark.parametrize("flags,message", [
    (["--queries", "QUERIES", "--trec", "x"], "--eval_data and --queries both name questions"), (["--trec", "x", "--results", "r"], "--results are for"),
    (["--metrics", "collate_key", "--measures", "x"], "--measures writes measures"), (["--trec", "x", "--nprobe", "0"], "--nprobe must be 1"),
    (["--trec", "x", "--key_template", "{text"], "--key_template '{text' cannot be used"), (["--trec", "x", "--stopwords", "xx"], "--stopwords xx"),
    (["--metrics", "nq"], "nq cannot be measured"), (["--metrics", "map", "--qrels", "qrels=QRELS"], "none of the qrels' documents"),
    (["--trec", "x", "--key_template", "{title:.0}"], "no document has a word besides stop words"),
    (["--trec", "x", "--key_template", "text"], "it names no column"), (["--metrics", "collate_score", "mrr"], "collate_score"),
    (["--trec", "x", "--ranker"], "use --retrieval_method rank")])
def test_what_cannot_work_is_told_before_the_search(flags, message, corpus, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "who"}\n')
    (tmp_path / "qrels").write_text("0 0 none 1\n")
    flags = [str(flag).replace("QRELS", f"{tmp_path}/qrels").replace("QUERIES", f"{tmp_path}/q.jsonl") for flag in flags]
    _, stderr = run("retrieve.py", "--retrieval_method", "bm25", "--corpus", corpus.parts[0].path, "--eval_data", tmp_path / "q.jsonl", *flags,
                    code=1, cwd=tmp_path)
    assert message in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1
    if "--key_template" not in flags:
        assert not (tmp_path / "corpus.jsonl.bm25-index").exists()
