"""Answer normalisation, exact match, F1 and has_answer against hand-worked cases of the originals' definitions."""
import random

import pytest

from metrics import (dpr_tokens, exact_match, f1, has_answer, normalize_answer, rank_documents, ranking_metrics,
                     topk_accuracy)


@pytest.mark.parametrize("text, normal", [
    ("The  Beatles!", "beatles"),
    ("A.B.C.", "abc"),              # punctuation goes before articles: no lone "a" is left
    ("an apple a day", "apple day"),
    ("Theatre", "theatre"),         # an article is a whole word
    ("14 December, 1972\tUTC", "14 december 1972 utc"),
    ("it’s", "it’s"),               # only ASCII punctuation is removed
    ("the", ""),
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
    assert dpr_tokens("Café-au-lait (1,5)") == ["cafe\u0301", "-", "au", "-", "lait", "(", "1", ",", "5", ")"]


@pytest.mark.parametrize("text, answers, found", [
    ("He was born in New York City.", ["new york"], True),
    ("He was born in Newer York.", ["new york"], False),
    ("The York New line", ["new york"], False),
    ("cafe\u0301 society", ["Café"], True),        # both sides are decomposed first
    ("in 2,718 cells", ["2,718"], True),
    ("in 2718 cells", ["2,718"], False),
    ("", ["x"], False),
])
def test_has_answer(text, answers, found):
    assert has_answer(text, answers) is found


def test_has_answer_regex():
    assert has_answer("released in 1984.", [r"198\d"], is_regex=True)
    assert not has_answer("released in 1974.", [r"198\d", "("], is_regex=True)


@pytest.mark.parametrize("tied", [False, True])
def test_ranked_lists_equal_trec_eval(tied):
    import pytrec_eval
    rng, cutoffs = random.Random(3), [1, 3, 5, 10]
    qrels = {f"q{i}": {f"d{d}": rng.choice([0, 0, 1, 2, 3]) for d in rng.sample(range(40), 12)} for i in range(30)}
    run = {q: {f"d{d}": rng.choice([0.1, 0.2, 0.3]) if tied else rng.random() for d in rng.sample(range(40), 20)} for q in qrels}
    names = {"recall": "recall", "ndcg": "ndcg_cut", "map": "map_cut", "success": "success"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{','.join(map(str, cutoffs))}" for name in names.values()} | {"recip_rank"})
    for query, want in theirs.evaluate(run).items():
        got = ranking_metrics(rank_documents(run[query]), qrels[query], [*names, "mrr"], cutoffs + [1000])
        for name, theirs_name in names.items():
            for k in cutoffs:
                assert got[f"{name}@{k}"] == pytest.approx(want[f"{theirs_name}_{k}"], abs=1e-6), (name, k)
        assert got["mrr@1000"] == pytest.approx(want["recip_rank"], abs=1e-6)


def test_ranked_lists_by_hand():
    got = ranking_metrics(["b", "a", "c"], {"a": 1, "d": 1}, ["recall", "mrr", "success", "map", "ndcg"], [1, 2])
    assert got["recall@1"] == 0 and got["recall@2"] == 0.5 and got["mrr@1"] == 0 and got["mrr@2"] == 0.5
    assert got["success@2"] == 1 and got["map@2"] == 0.25 and got["ndcg@2"] == pytest.approx(0.63093 / 1.63093, abs=1e-5)
    assert topk_accuracy([False, True, False], [1, 2, 20]) == {"nq@1": 0.0, "nq@2": 1.0, "nq@20": 1.0}
    with pytest.raises(ValueError, match="unknown metric"):
        ranking_metrics([], {}, ["precision"], [1])
