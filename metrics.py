"""Measures of open-domain question answering, as DPR and FiD define them."""
import re
import string
import unicodedata
from collections import Counter

import regex

PUNCTUATION = str.maketrans("", "", string.punctuation)
DPR_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", flags=regex.IGNORECASE | regex.MULTILINE)


def normalize_answer(text):
    """Lower case, no ASCII punctuation, no articles, single spaces, in this order (SQuAD v1.1 evaluation)."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, answers):
    """1.0 if the normalised prediction equals one of the normalised gold answers, else 0.0."""
    guess = normalize_answer(prediction)
    return float(any(guess == normalize_answer(answer) for answer in answers))


def f1(prediction, answers):
    """Largest F1 between the bags of normalised words of the prediction and of one gold answer (SQuAD v1.1)."""
    guess, best = Counter(normalize_answer(prediction).split()), 0.0
    for answer in answers:
        gold = Counter(normalize_answer(answer).split())
        common = (guess & gold).total()
        if common:
            best = max(best, 2 * common / (guess.total() + gold.total()))
    return best


def dpr_tokens(text):
    """Lower-cased tokens of DPR's SimpleTokenizer: runs of letters, digits and marks, or one other symbol; NFD first."""
    return [token.lower() for token in DPR_TOKEN.findall(unicodedata.normalize("NFD", text))]


def has_answer(text, answers, is_regex=False):
    """True if one answer's tokens stand next to each other in the passage's text (DPR); the title is not searched.

    With `is_regex` each answer is a regular expression searched in the raw text (CuratedTREC); one that does not
    compile matches nothing, as in DPR.
    """
    if is_regex:
        return any(_regex_found(pattern, text) for pattern in answers)
    tokens = dpr_tokens(text)
    for answer in answers:
        wanted = dpr_tokens(answer)
        if any(tokens[i:i + len(wanted)] == wanted for i in range(len(tokens) - len(wanted) + 1)):
            return True
    return False


def _regex_found(pattern, text):
    try:
        compiled = regex.compile(unicodedata.normalize("NFD", pattern),
                                 flags=regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)
    except regex.error:
        return False
    return compiled.search(unicodedata.normalize("NFD", text)) is not None
