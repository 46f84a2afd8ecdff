"""The measures against hand-worked cases of their original definitions, and against trec_eval."""
import random

import pytest
import pytrec_eval

from metrics import (
    dpr_tokens,
    exact_match,
    f1,
    find_answers,
    has_answer,
    normalize_answer,
    ranking_metrics,
    topk_accuracy,
    trec_order,
)


@pytest.mark.parametrize("text, normal", [
    ("The  Beatles!", "beatles"),
    ("A.B.C.", "abc"),              # punctuation goes before articles: no lone "a" is left
    ("an apple a day", "apple day"),
    ("Theatre", "theatre"),         # only whole words are articles
    ("14 December, 1972\tUTC", "14 december 1972 utc"),
    ("it’s", "it’s"),               # only ASCII punctuation is removed
    ("the", ""),
    ("a\u0301 the\u0300 an", "a\u0301 the\u0300"),  # a mark belongs to its word (FiD, DPR)
])
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_takes_any_gold():
    assert exact_match("the Foreigner", ["Styx", "foreigner."]) == 1.0
    assert exact_match("Foreigner band", ["Foreigner"]) == 0.0
    assert exact_match("Foreigner", []) == 0.0


def test_f1_is_over_bags_of_words_and_best_gold():
    assert f1("red red blue", ["red blue blue"]) == pytest.approx(2 / 3)  # common: red, blue
    assert f1("big red ball", ["green", "red ball"]) == pytest.approx(0.8)
    assert f1("x", ["y"]) == 0.0


def test_dpr_tokens():
    expected = ["cafe\u0301", "-", "au", "-", "lait", "(", "1", ",", "5", ")"]
    assert dpr_tokens("Café-au-lait (1,5)") == expected


@pytest.mark.parametrize("text, answers, expected", [
    ("He was born in New York City.", ["new york"], True),
    ("He was born in Newer York.", ["new york"], False),
    ("The York New line", ["new york"], False),
    ("cafe\u0301 society", ["Café"], True),        # both sides are decomposed first
    ("in 2,718 cells", ["2,718"], True),
    ("in 2718 cells", ["2,718"], False),
    ("", ["x"], False),
])
def test_has_answer(text, answers, expected):
    assert has_answer(text, answers) is expected
    assert bool(find_answers(text, answers)) is expected


def test_find_answers_finds_what_has_answer_counts():
    rng = random.Random(0)
    letters = ["a", "B", "b", " ", " ", "-", "e\u0301", "é", "\u0301", "≠", "가", "𝒳", "\u200f",
               "İ"]
    for _ in range(2000):
        text = "".join(rng.choices(letters, k=rng.randrange(20)))
        answers = ["".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(2)]
        answers = [answer for answer in answers if dpr_tokens(answer)]
        spans = find_answers(text, answers)
        assert bool(spans) == has_answer(text, answers), (text, answers)
        ends = [end for span in spans for end in span]
        assert ends == sorted(ends) and all(0 <= start < end <= len(text) for start, end in spans)
    assert find_answers("Été in NEW  York, new york", ["new york", "été"]) == [
        (0, 3), (7, 16), (18, 26)]
    assert find_answers("a b a b a", ["a b a"]) == [(0, 9)]  # they overlap
    assert find_answers("any", ["", "–"]) == []


def test_has_answer_regex():
    assert has_answer("released in 1984.", [r"198\d"], is_regex=True)
    assert not has_answer("released in 1974.", [r"198\d", "("], is_regex=True)


@pytest.mark.parametrize("tied", [False, True])
def test_ranked_lists_equal_trec_eval(tied):
    rng = random.Random(3)
    cutoffs = [1, 3, 5, 10]
    qrels, run = {}, {}
    for i in range(30):
        documents = rng.sample(range(40), 12)
        qrels[f"q{i}"] = {f"d{d}": rng.choice([0, 0, 1, 2, 3]) for d in documents}
    for query in qrels:
        scores = {}
        for d in rng.sample(range(40), 20):
            scores[f"d{d}"] = rng.choice([0.1, 0.2, 0.3]) if tied else rng.random()
        run[query] = scores

    trec_names = {"recall": "recall", "ndcg": "ndcg_cut", "map": "map_cut", "success": "success"}
    at_cutoffs = ",".join(map(str, cutoffs))
    measures = {f"{name}.{at_cutoffs}" for name in trec_names.values()} | {"recip_rank"}
    for query, expected in pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run).items():
        ids = list(run[query])
        ranking = [ids[position] for position in trec_order(ids, list(run[query].values()))]
        ours = ranking_metrics(ranking, qrels[query], [*trec_names, "mrr"], cutoffs + [1000])
        for name, trec_name in trec_names.items():
            for k in cutoffs:
                value = expected[f"{trec_name}_{k}"]
                assert ours[f"{name}@{k}"] == pytest.approx(value, abs=1e-6), (name, k)
        assert ours["mrr@1000"] == pytest.approx(expected["recip_rank"], abs=1e-6)


def test_ranked_lists_by_hand():
    names = ["recall", "mrr", "success", "map", "ndcg"]
    ours = ranking_metrics(["b", "a", "c"], {"a": 1, "d": 1}, names, [1, 2])
    assert ours["recall@1"] == 0
    assert ours["recall@2"] == 0.5
    assert ours["mrr@1"] == 0
    assert ours["mrr@2"] == 0.5
    assert ours["success@2"] == 1
    assert ours["map@2"] == 0.25
    assert ours["ndcg@2"] == pytest.approx(0.63093 / 1.63093, abs=1e-5)


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="unknown metric"):
        ranking_metrics([], {}, ["accuracy"], [1])


def test_topk_accuracy():
    accuracy = topk_accuracy([False, True, False], [1, 2, 20])
    assert accuracy == {"nq@1": 0.0, "nq@2": 1.0, "nq@20": 1.0}
