"""Measures of open-domain question answering, as DPR and FiD define them, and of ranked lists, as trec_eval does."""
import math
import re
import string
import unicodedata
from collections import Counter

import numpy as np
import regex

PUNCTUATION = str.maketrans("", "", string.punctuation)
METRICS = ("mrr", "recall", "ndcg", "map", "success", "nq")  # of ranked lists: ranking_metrics' names, and topk_accuracy's
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


# ---------------------------------------------------------------------------------------------------- ranked lists

def rank_documents(scores):
    """The documents of {id: score} by falling score; equal float32 scores by falling id, as trec_eval ranks them."""
    return sorted(scores, key=lambda document: (np.float32(scores[document]), str(document)), reverse=True)


def precision_sum(ranking, relevant, k):
    """Sum of the precisions at the ranks, up to k, of relevant documents; over their number it is the average precision."""
    hits, total = 0, 0.0
    for rank, document in enumerate(ranking[:k], 1):
        if document in relevant:
            hits += 1
            total += hits / rank
    return total


def dcg(gains, k):
    """Discounted cumulative gain of the first k gains, as trec_eval computes it."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], 1))


def ranking_metrics(ranking, labels, names, cutoffs):
    """{name@k: value} of one query's ranked documents; labels {document: relevance}, relevant from 1 on as in trec_eval.

    names: recall, mrr, ndcg (gain = label, discount log2(rank + 1)), map, success. ValueError for another one.
    """
    relevant = {document for document, label in labels.items() if label >= 1}
    first = next((rank for rank, document in enumerate(ranking, 1) if document in relevant), math.inf)
    ideal = sorted((label for label in labels.values() if label > 0), reverse=True)
    gains = [max(0, labels.get(document, 0)) for document in ranking]
    result = {}
    for name in names:
        for k in cutoffs:
            if name == "recall":
                value = len(relevant.intersection(ranking[:k])) / max(1, len(relevant))
            elif name == "mrr":
                value = 1 / first if first <= k else 0.0
            elif name == "ndcg":
                value = dcg(gains, k) / dcg(ideal, k) if ideal else 0.0
            elif name == "map":
                value = precision_sum(ranking, relevant, k) / max(1, len(relevant))
            elif name == "success":
                value = float(first <= k)
            else:
                raise ValueError(f"unknown metric {name}")
            result[f"{name}@{k}"] = value
    return result


def topk_accuracy(hits, cutoffs):
    """{nq@k: 1.0 if one of the first k passages holds an answer} of one question's has_answer values in rank order (DPR)."""
    return {f"nq@{k}": float(any(hits[:k])) for k in cutoffs}
