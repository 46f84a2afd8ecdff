"""predict.py: the files of predictions."""
import json

from predict import Prediction, count_best_with_answer, write_predictions

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


def test_how_often_the_highest_score_is_of_a_passage_with_an_answer():
    passages = [{"text": "The baker slept."}, {"text": "It was an otter."}]
    record = {"answers": ["otter"], "ctxs": passages}
    records = [record, record, record | {"answers": ["heron"]}, record | {"ctxs": []}]
    scores = [[-2.0, -1.0], [-1.0, -2.0], [-1.0, -2.0], [float("-inf")]]
    predictions = [Prediction(index, "", None, None, row) for index, row in enumerate(scores)]
    assert count_best_with_answer(predictions, records) == (1, 2)
