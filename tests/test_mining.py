"""Candidates that records bring along, and LLM-Embedder's collated files."""
import json

import pytest

from dense.examples import read_examples
from records.corpus import Corpus
from records.questions import read_questions
from retrieval.flags import check_collated
from retrieval.mining import check_candidates, collated_path, list_candidates, to_documents
from retrieval.search import SearchSettings
from retrieval_helpers import (
    make_flags,
    make_questions,
    make_results,
    rank_candidates,
    write_corpus,
)
from retrieve import check_records, write_outputs
from utils import InputError


@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")


SETTINGS = SearchSettings("bm25", 9, key_template="{title} {text}")


def collate(folder, kind, questions, results, corpus, labels=None, log=print, **changes):
    """Return the records of the file that retrieve.py --metrics KIND writes."""
    flags = make_flags(metrics=[kind], eval_data=f"{folder}/q.csv", save_name="x", **changes)
    labels = labels or [{}] * len(questions)
    write_outputs(flags, SETTINGS, [1], questions, results, corpus, labels, log)
    return [json.loads(line) for line in open(collated_path(f"{folder}/q.csv", kind, "x"))]


def test_given_candidates_need_indices_where_documents_are_written(corpus):
    good = {"pos": ["a"], "pos_index": [3], "neg": ["b"], "neg_index": [1]}
    check_candidates(make_questions(good), corpus, "{text}", True)
    assert to_documents(make_questions(good), rank_candidates([1, 0])).row(0)[0] == [1, 3]
    assert list_candidates({"pos": ["a"], "neg": ["b"], "neg_index": [1]}) == (["a", "b"], None)
    check_candidates(make_questions({"pos": ["a"], "neg": ["b"]}), None, "{text}", False)
    both = {"pos": ["a"], "neg": ["b"], "key": ["b", "a"]}
    assert list_candidates(both)[0] == ["b", "a"]
    assert list_candidates(both, scored=True)[0] == ["a", "b"]  # what teacher_scores are of
    assert list_candidates({"key": ["b", "a"]}, scored=True)[0] == ["b", "a"]
    nulls = {"history": None, "key": None, "pos": ["a"], "pos_index": [4]}
    assert list_candidates(nulls) == (["a"], [4])
    chat = {"history": ["a", "b"], "teacher_scores": [1, 2]}  # LLM-Embedder's
    assert list_candidates(chat) == (["a", "b"], None)
    with pytest.raises(InputError, match="no question has candidates"):
        check_candidates(make_questions({}, {"pos": []}), None, "{text}", False)
    for bad, message in (({"pos": ["a"], "neg": ["b"]}, "not every candidate"),
                         ({**good, "neg_index": [8]}, "8 is the index of no document"),
                         ({**good, "neg_index": ["d1"]}, "'d1' is the index"),
                         ({"key": ["a", "b"], "key_index": [1]}, "not every candidate"),
                         ({"key": [3], "key_index": [1]}, "must be a text or an object"),
                         ({"key": "a"}, "'key' must be a list"),
                         ({"key": [{"title": "x"}], "key_index": [1]},
                          "no column 'text' for --key_template '{text}'")):
        with pytest.raises(InputError, match=f"^f:0: .*{message}"):
            check_candidates(make_questions(bad), corpus, "{text}", True)


def test_collated_candidates_keep_their_texts(tmp_path):
    """Without document indices they get none: an index among the candidates is no document's."""
    questions = make_questions({"key": ["a", {"text": "b"}, "c"]},
                               {"key": ["a", "b", "c"], "key_index": [7, 5, 6]})
    ranked = rank_candidates([2, 0, 1], [1, 2, 0])
    rows = collate(tmp_path, "collate_key", questions, ranked, None)
    assert rows[0]["key"] == ["c", "a", "b"] and "key_index" not in rows[0]
    assert rows[1]["key"] == ["b", "c", "a"] and rows[1]["key_index"] == [5, 6, 7]
    rows = collate(tmp_path, "collate_score", questions, ranked, None)
    assert rows[0]["teacher_scores"] == [-1, -2, 0] and rows[1]["teacher_scores"] == [-2, 0, -1]


def test_positives_are_never_mined(corpus, tmp_path):
    """A16, and its kind: the passage of a reader's record is a positive, too."""
    hits = make_results([0, 1, 2, 3, 4, 5])
    second = {"title": "t2", "text": "text 2"}
    for record, labels, left in (({"pos": ["t1 text 1"]}, {}, [0, 2, 3, 4, 5]),
                                 ({"pos": [second]}, {}, [0, 1, 3, 4, 5]),
                                 ({"pos_index": [4], "pos": ["other"]}, {}, [0, 1, 2, 3, 5]),
                                 ({"passage": "text 5"}, {}, [0, 1, 2, 3, 4]),
                                 ({"passage": {"id": "d0", "text": "x"}}, {}, [1, 2, 3, 4, 5]),
                                 ({}, {3: 1, 5: 0, -2: 1}, [0, 1, 2, 4, 5]),
                                 ({"answers": ["Text 4"]}, {}, [0, 1, 2, 3, 5])):
        questions = make_questions(record)
        row, = collate(tmp_path, "collate_neg", questions, hits, corpus, labels=[labels],
                        filter_answers=True)
        assert row["neg_index"] == left
        assert row["neg"] == [corpus.text(doc_index) for doc_index in left]


def test_questions_without_hits_and_old_teacher_scores_are_dropped(corpus, tmp_path):
    questions = make_questions({"id": "a", "teacher_scores": [1]}, {"id": "b"})
    row, = collate(tmp_path, "collate_neg", questions, make_results([0, 1], [-1, -1]), corpus)
    assert row["id"] == "a" and row["neg_index"] == [0, 1] and "teacher_scores" not in row


def test_mined_negatives_of_dpr_records_are_dpr_records(corpus, tmp_path):
    """train_dense.py reads them as it reads DPR's own."""
    passage = {"title": "other", "text": "words", "passage_id": "d2"}
    record = {"positive_ctxs": [passage, {"title": "t1", "text": "text 1"}],
              "hard_negative_ctxs": [{"title": "old", "text": "old"}]}
    results = make_results([1, 2, 0, 5])
    row, = collate(tmp_path, "collate_neg", make_questions(record), results, corpus, max_neg_num=1)
    assert row["hard_negative_ctxs"] == [{"title": "", "text": "text 0", "passage_id": "d0"}]
    assert "neg" not in row
    assert read_examples(tmp_path / "q.neg.x.json")[0].neg == row["hard_negative_ctxs"]
    ranked = make_questions(record | {"key": ["a", "t1 text 1", "c"]})
    row, = collate(tmp_path, "collate_neg", ranked, rank_candidates([2, 1, 0]), None)
    assert row["hard_negative_ctxs"] == [{"title": "", "text": "c"}, {"title": "", "text": "a"}]


# ---------------------------------------------------------------- mined positives

def mine_positives(folder, table, hits, corpus, **changes):
    """Return (records, lines logged) of collate_pos on a table of questions."""
    (folder / "q.csv").write_text(table)
    questions = read_questions(folder / "q.csv")
    logged = []
    rows = collate(folder, "collate_pos", questions, hits, corpus, log=logged.append, **changes)
    return rows, logged


def test_the_highest_hit_that_holds_an_answer_is_the_positive(corpus, tmp_path):
    """By hand: the passages are "text 0" .. "text 7", and an answer is looked for by words."""
    table = "question,answer\nwho,TEXT 2\nwhat,\"['5', '4']\"\nwhere,Rome\nwhen,\nhow,text\n"
    hits = make_results([1, 2, 3, 0], [4, 5, 6, 1], [0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0])
    rows, logged = mine_positives(tmp_path, table, hits, corpus, max_neg_num=2)
    assert [row["id"] for row in rows] == ["0", "1", "4"]
    assert rows[0]["question"] == "who" and rows[0]["answers"] == ["TEXT 2"]
    positive = {"title": "t2", "text": "text 2", "passage_id": "d2"}
    assert rows[0]["positive_ctxs"] == [positive]

    def ids(row, field):
        return [context["passage_id"] for context in row[field]]
    assert ids(rows[0], "hard_negative_ctxs") == ["d1", "d3"]
    # the second hit that holds an answer is neither
    assert ids(rows[1], "positive_ctxs") == ["d4"]
    assert ids(rows[1], "hard_negative_ctxs") == ["d6", "d1"]
    assert ids(rows[2], "hard_negative_ctxs") == []
    assert logged == [f"collate_pos: {tmp_path}/q.pos.x.json",
                      "3 of 5 questions got a positive; dropped: 1 whose hits hold no answer, 1 "
                      "without answers"]
    examples = read_examples(tmp_path / "q.pos.x.json")
    assert examples[0].query == "who" and examples[0].pos == [positive]
    assert len(examples[0].neg) == 2


def test_mined_positives_replace_those_of_the_record(corpus, tmp_path):
    """Else old positives, negatives and scores would be trained on with new ones."""
    record = {"query": "who", "id": "x", "answers": ["text 1"], "pos": ["a"], "neg": ["b"],
              "pos_index": [3], "neg_index": [4], "teacher_scores": [1, 2], "task": "qa",
              "negative_ctxs": [{"text": "text 1"}]}
    rows, _ = mine_positives(tmp_path, json.dumps(record) + "\n", make_results([0, 1]), corpus)
    assert rows[0].keys() == {"id", "question", "query", "answers", "task", "positive_ctxs",
                              "hard_negative_ctxs"}
    assert rows[0]["positive_ctxs"][0]["passage_id"] == "d1"


@pytest.mark.parametrize("eval_data, expected", [
    ("a/q.csv", "a/q.pos.x.json"), ("a/q.tsv.gz", "a/q.pos.x.json"), ("a.b/q", "a.b/q.pos.x.json"),
    ("q.jsonl", "q.pos.x.jsonl"), ("q.json.gz", "q.pos.x.json")])
def test_collated_files_of_tables_hold_records(eval_data, expected):
    assert collated_path(eval_data, "collate_pos", "x") == expected


def test_positives_cannot_be_mined_without_answers_or_passages(corpus):
    flags = make_flags(metrics=["collate_pos"], eval_data="q.csv")
    check_collated(flags)
    with pytest.raises(InputError, match="collate_pos finds positives by their answers"):
        check_records(make_questions({}), [{}], corpus, flags, "{text}")
    flags.metrics = ["collate_neg", "collate_pos"]
    with pytest.raises(InputError, match="leave collate_neg out.* q.pos.bm25.json as --eval_data"):
        check_collated(flags)
    flags.metrics, flags.retrieval_method = ["collate_pos"], "rank"
    with pytest.raises(InputError, match="search it, or rank an earlier result with --results"):
        check_collated(flags)


def test_scores_of_dpr_records_are_of_what_is_trained_on(corpus, tmp_path):
    """collate_score and train_dense.py agree on the candidates: one positive, then negatives."""
    record = {"question": "q", "key": ["others"],
              "positive_ctxs": [{"title": "t", "text": text} for text in ("right", "too")],
              "hard_negative_ctxs": [{"title": "t", "text": "hard"}],
              "negative_ctxs": [{"title": "t", "text": "easy"}]}
    keys, doc_indices = list_candidates(record, scored=True)
    assert [key["text"] for key in keys] == ["right", "hard"] and doc_indices is None
    assert list_candidates(record)[0] == ["others"]
    easy = record | {"hard_negative_ctxs": [], "key": None}
    assert [key["text"] for key in list_candidates(easy)[0]] == ["right", "easy"]
    questions = make_questions(record)
    check_candidates(questions, None, "{text}", need_indices=False, scored=True)
    row, = collate(tmp_path, "collate_score", questions, rank_candidates([1, 0]), None)
    example, = read_examples(tmp_path / "q.scored.x.json")
    assert example.scores == row["teacher_scores"] == [-1, 0]
    assert example.pos + example.neg == keys


@pytest.mark.parametrize("limits, left", [
    ({"neg_ranks": [3, 5]}, [2, 4]), ({"neg_max_score": -3.0}, [4, 5]),
    ({"neg_margin": 1.0}, [4, 5]), ({"neg_margin": 2.5}, []), ({"neg_relative_margin": 0.5}, [5]),
    ({"neg_ranks": [1, 5], "neg_max_score": -1.0}, [1, 2, 4])])
def test_negatives_from_a_range_below_a_score_or_a_margin(limits, left, corpus, tmp_path):
    """Part D of faults.md: the hits score 0, -1 .. -5, and document 3, the positive, scores -3."""
    questions = make_questions({"id": "a", "pos_index": [3]})
    hits = make_results([0, 1, 2, 3, 4, 5])
    row, = collate(tmp_path, "collate_neg", questions, hits, corpus, **limits)
    assert row["neg_index"] == left
    logged = []
    collate(tmp_path, "collate_neg", questions, hits, corpus, log=logged.append, **limits)
    assert any("have no hard negative" in line for line in logged) == (not left)
    # a positive that is no hit: nothing is known to be below it
    if "neg_margin" in limits:
        row, = collate(tmp_path, "collate_neg", make_questions({"pos_index": [7]}), hits, corpus,
                        **limits)
        assert row["neg_index"] == []


def test_limits_of_negatives_beside_mined_positives(corpus, tmp_path):
    """The positive is the highest hit with an answer, here the second, with the score -1."""
    hits = make_results([0, 2, 4, 5, 6])
    for limits, left in (({"neg_ranks": [1, 3]}, ["d0", "d4"]), ({"neg_margin": 2}, ["d5", "d6"]),
                         ({}, ["d0", "d4", "d5", "d6"])):
        rows, _ = mine_positives(tmp_path, "question,answer\nwho,2\n", hits, corpus, **limits)
        assert [context["passage_id"] for context in rows[0]["hard_negative_ctxs"]] == left


@pytest.mark.parametrize("changes, message", [
    ({"neg_ranks": [0, 3]}, "two ranks >= 1"), ({"neg_ranks": [5, 3]}, "the lower one first"),
    ({"neg_ranks": [30, 40]}, "raise --hits"), ({"neg_margin": -1.0}, "--neg_margin must be >= 0"),
    ({"neg_max_score": float("nan")}, "must be a finite number"),
    ({"neg_margin": 1.0, "metrics": ["collate_key"]}, "is for mined negatives")])
def test_limits_that_cannot_be_used(changes, message):
    flags = make_flags(**{"metrics": ["collate_neg"], "hits": 20, "eval_data": "q.json"} | changes)
    with pytest.raises(InputError, match=message):
        check_collated(flags)


def test_answers_as_patterns_are_filtered(corpus, tmp_path):
    questions = make_questions({"answers": [r"text [12]\b"]})
    for match, left in (("regex", [0, 3]), ("string", [0, 1, 2, 3])):
        row, = collate(tmp_path, "collate_neg", questions, make_results([0, 1, 2, 3]), corpus,
                        filter_answers=True, match=match)
        assert row["neg_index"] == left
