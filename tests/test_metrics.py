"""Answer normalisation, exact match, F1 and has_answer against hand-worked cases of the originals' definitions."""
import pytest

from metrics import dpr_tokens, exact_match, f1, has_answer, normalize_answer


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
