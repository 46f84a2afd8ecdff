"""reader/predict.py: the files of predictions."""
import gzip
import json

import pytest
from transformers import AutoTokenizer

from conftest import TOKENIZER
from data import Collator
from reader.predict import (
    Prediction,
    check_answers,
    choose_beams,
    count_best_with_answer,
    note_too_long,
    note_unspelled,
    write_predictions,
    write_scores,
)
from records.reader_records import read_records
from test import insert_count
from utils import InputError

RECORDS = [{"id": "q0", "question": "where?", "answers": ["Paris"], "ctxs": [
    {"id": "p7", "text": "Lyon is a city."}, {"id": "p3", "text": "The capital is Paris."},
    {"id": "p5", "text": "not read"}]},
    {"id": "q1", "question": "who?", "answers": [], "ctxs": []}]


def test_predictions_carry_the_contexts_that_they_are_of(tmp_path):
    predictions = [Prediction(0, "Paris", 1.0, 1.0, [0.25, 0.75]),
                   Prediction(1, "?", None, None, [])]
    write_predictions(str(tmp_path / "p.jsonl"), predictions, RECORDS, True)
    first, second = map(json.loads, open(tmp_path / "p.jsonl"))
    assert first["best_context"] == "p3"
    assert first["contexts"] == [{"id": "p7", "score": 0.25, "has_answer": False},
                                 {"id": "p3", "score": 0.75, "has_answer": True}]
    assert second["best_context"] is None and second["contexts"] == []


def test_without_scores_predictions_say_nothing_of_contexts(tmp_path):
    predictions = [Prediction(0, "Paris", 1.0, 1.0, None)]
    write_predictions(str(tmp_path / "p.jsonl"), predictions, RECORDS, False)
    assert "contexts" not in json.loads((tmp_path / "p.jsonl").read_text())
    write_predictions(str(tmp_path / "p.tsv"), predictions, RECORDS, False)
    assert (tmp_path / "p.tsv").read_text() == "0\tParis\t['Paris']\t1.0\n"


def test_names_may_end_in_gz(tmp_path):
    """Check that the name without .gz decides the format, also with several --num_contexts."""
    path = str(tmp_path / "p.jsonl.gz")
    write_predictions(path, [Prediction(0, "Paris", 1.0, 1.0, None)], RECORDS, False)
    with gzip.open(path, "rt") as file:
        assert json.loads(file.read())["prediction"] == "Paris"
    assert insert_count(path, 5, [1, 5]) == str(tmp_path / "p.5.jsonl.gz")


@pytest.mark.parametrize("num_beams, n_best, message", [
    (2, 3, "--n_best 3 needs as many beams, --num_beams is 2"),
    (None, 0, "--n_best must be >= 1, got 0"),
])
def test_fewer_beams_than_answers_are_refused(num_beams, n_best, message):
    with pytest.raises(InputError, match=message):
        choose_beams(num_beams, n_best)


def test_beams_are_as_many_as_answers():
    for given, beams in ((None, 1), (1, 1), (4, 4)):
        assert choose_beams(None, given) == beams


def test_how_often_the_highest_score_is_of_a_passage_with_an_answer():
    passages = [{"text": "The baker slept."}, {"text": "It was an otter."}]
    record = {"answers": ["otter"], "ctxs": passages}
    records = [record, record, record | {"answers": ["heron"]}, record | {"ctxs": []}]
    scores = [[-2.0, -1.0], [-1.0, -2.0], [-1.0, -2.0], [float("-inf")]]
    predictions = [Prediction(index, "", None, None, row) for index, row in enumerate(scores)]
    assert count_best_with_answer(predictions, records) == (1, 2)


@pytest.mark.parametrize("text, cell", [
    ("Open at seven\nClosed at nine", "Open at seven Closed at nine"),
    ("a \t b\r\n\u2028c\x85d\x0be", "a b c d e"), ("two  blanks", "two  blanks"),
])
def test_a_question_takes_one_line(text, cell, tmp_path):
    """B6, E9: check that no line end or tab of a prediction or gold answer breaks the table."""
    records = [{"id": 0, "question": "q", "answers": ["a\tb\u2028c\n"], "ctxs": []}]
    write_predictions(str(tmp_path / "p.tsv"), [Prediction(0, text, 1.0, 1.0, None)], records,
                      False)
    line, = (tmp_path / "p.tsv").read_text().splitlines()
    assert line == f"0\t{cell}\t{records[0]['answers']}\t1.0"


def scored_again(path, out, scores):
    """Return the contexts of a file's only record after a reader has scored the first contexts."""
    records = read_records(path)
    predictions = [Prediction(0, "", None, None, scores)]
    write_scores(str(out), predictions, records)
    return read_records(out)[0]["ctxs"]


def test_a_score_has_one_meaning_in_a_file(tmp_path):
    """A22: check that a context that was not read keeps no retriever's score, and stays behind the
    others when the file is read or scored again.
    """
    contexts = [{"id": str(i), "text": "t", "score": 9 - i} for i in range(4)]
    (tmp_path / "r.json").write_text(json.dumps([{"question": "q", "ctxs": contexts}]))
    once = scored_again(tmp_path / "r.json", tmp_path / "s.jsonl", [-3.0, -1.0])
    assert [(c["id"], c.get("score"), c["retrieval_score"]) for c in once] == [
        ("1", -1.0, 8), ("0", -3.0, 9), ("2", None, 7), ("3", None, 6)]
    twice = scored_again(tmp_path / "s.jsonl", tmp_path / "t.jsonl", [-5.0])
    assert [(c["id"], c.get("score"), c["retrieval_score"]) for c in twice] == [
        ("1", -5.0, 8), ("0", None, 9), ("2", None, 7), ("3", None, 6)]


@pytest.fixture(scope="module")
def collator():
    return Collator(AutoTokenizer.from_pretrained(TOKENIZER), 1, 100)


def test_answers_that_the_tokenizer_cannot_spell_are_counted(collator):
    """A31: check that a question counts unless some answer's tokens decode to an exact match."""
    lists = [["baker"], ["9 m²", "The Baker!"], ["9 m²"], ["H₂O"], []]
    check = check_answers(lists, collator, 48)
    assert check[:3] == (4, 2, ("9 m²", "9 m"))
    logged = []
    note_unspelled(check, "targets of f.json", logged.append)
    note_unspelled(check_answers(lists[2:], collator, 48), "targets of f.json", logged.append)
    note_unspelled(check_answers(lists[:2], collator, 48), "targets of f.json", logged.append)
    assert len(logged) == 2 and "decode to '9 m'" in logged[0]
    assert "2 of 4 targets of f.json cannot be answered right" in logged[0]
    assert "NONE of the 2 targets of f.json can be answered right" in logged[1]


def test_answers_longer_than_the_limit_are_counted(collator):
    """A30: check that a question counts if its shortest answer has more tokens than the limit.
    """
    lengths = [len(collator.target_ids(text)) - 1 for text in ("Ada Brisk", "a b c d e f g h")]
    lists = [["Ada Brisk", "a b c d e f g h"], ["a b c d e f g h"]]
    assert check_answers(lists, collator, max(lengths))[3] == 0
    check = check_answers(lists, collator, max(lengths) - 1)
    assert check[3:] == (1, max(lengths)) and lengths[0] < lengths[1]
    logged = []
    note_too_long(check, "questions of f", max(lengths), max(lengths) - 1, "limit", logged.append)
    assert "1 of 2 questions of f have no answer of at most" in logged[0]
    assert f"--limit {max(lengths) + 2} is enough for all" in logged[0]
