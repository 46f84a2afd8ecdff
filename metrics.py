"""Compute the measures of answers (DPR, FiD) and of ranked lists (trec_eval)."""
import functools
import math
import string
import unicodedata
from collections import Counter

import numpy as np
import regex

PUNCTUATION = str.maketrans("", "", string.punctuation)
DPR_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]",
                          flags=regex.IGNORECASE | regex.MULTILINE)

# Letters of scripts without spaces between words (lb=SA: Thai, Lao, Khmer, Burmese and related
# scripts), and Hangul, in which particles are attached to words. When words are compared, each of
# these letters counts as a word, together with its marks.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{lb=SA}\u30fc"
UNSPACED_LETTER = regex.compile(f"[{UNSPACED}]")
UNSPACED_TOKEN = regex.compile(rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+|(?=[{UNSPACED}])\X"
                               r"|[^\p{Z}\p{C}]", flags=regex.VERSION1)
UNSPACED_WORD = regex.compile(rf"(?=[{UNSPACED}])\X|[^\s{UNSPACED}]+")
ANY_PUNCTUATION = regex.compile(r"\p{P}")


# ------------------------------------------------------------------------------------------ answers

def normalize_answer(text):
    """Return a text in lower case, without ASCII punctuation and articles, with single blanks.

    The steps and their order are SQuAD v1.1's. As in FiD and DPR, articles are found with the
    module regex. Unlike SQuAD's re, it counts a combining mark as part of a word.
    """
    text = text.lower().translate(PUNCTUATION)
    text = regex.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def has_unspaced(text):
    """Return True if a text has UNSPACED letters."""
    return not text.isascii() and UNSPACED_LETTER.search(text) is not None


def exact_match(prediction, answers):
    """Return 1.0 if the normalised prediction equals a normalised gold answer (FiD), else 0.0.

    As in FiD, Unicode is not normalised, so the NFC and NFD forms of a letter differ.
    """
    prediction = normalize_answer(prediction)
    return float(any(prediction == normalize_answer(answer) for answer in answers))


def f1(prediction, answers):
    """Return the highest word F1 of the prediction with any gold answer (SQuAD v1.1).

    Both are normalised by normalize_answer. In a text with UNSPACED letters, each such letter is a
    word, and punctuation of any script is removed, as in MLQA, DRCD and KorQuAD.
    """
    predicted_words = count_words(prediction)
    best = 0.0
    for answer in answers:
        gold_words = count_words(answer)
        num_common = (predicted_words & gold_words).total()
        if num_common:
            best = max(best, 2 * num_common / (predicted_words.total() + gold_words.total()))
    return best


def count_words(text):
    """Return {word: count} of a normalised text."""
    text = normalize_answer(text)
    if has_unspaced(text):
        return Counter(UNSPACED_WORD.findall(ANY_PUNCTUATION.sub("", text)))
    return Counter(text.split())


def regex_match(prediction, patterns):
    """Return 1.0 if a regular expression matches the prediction's beginning, else 0.0 (DrQA)."""
    text = unicodedata.normalize("NFD", prediction)
    return float(any(pattern.match(text) for pattern in map(compile_pattern, patterns) if pattern))


# ----------------------------------------------------------------------------------------- passages

def dpr_tokens(text):
    """Return the lower-cased tokens of DPR's SimpleTokenizer.

    A token is a run of letters, digits and marks, or one other symbol. The text is normalised to
    Unicode's NFD first. Unlike in DPR, each UNSPACED letter is a token. In DPR, a Chinese sentence
    is one token, which never matches a shorter answer.
    """
    text = unicodedata.normalize("NFD", text)
    return [token.lower() for token in choose_pattern(text).findall(text)]


def choose_pattern(text):
    """Return the pattern that splits a text into tokens."""
    return UNSPACED_TOKEN if has_unspaced(text) else DPR_TOKEN


def has_answer(text, answers, is_regex=False):
    """Return True if the passage's text contains an answer's tokens consecutively (DPR).

    The title is not searched. With `is_regex` each answer is a regular expression that is searched
    for in the raw text (CuratedTREC; DPR's --match regex).
    """
    if is_regex:
        return any(matches_regex(pattern, text) for pattern in answers)
    tokens = dpr_tokens(text)
    return any(contains_tokens(tokens, dpr_tokens(answer)) for answer in answers)


def find_answers(text, answers, is_regex=False):
    """Return the spans [(start, end)] of a text in which has_answer finds an answer.

    Spans are in order, and overlapping ones are merged.
    """
    decomposed = unicodedata.normalize("NFD", text)
    spans = find_patterns(decomposed, answers) if is_regex else find_tokens(decomposed, answers)
    if not spans:
        return []
    # origins[i] is the position in the text from which character i of its NFD form comes
    origins = []
    for position, character in enumerate(text):
        origins += [position] * len(unicodedata.normalize("NFD", character))
    spans = [(origins[start], origins[end - 1] + 1) for start, end in spans]
    merged = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def find_tokens(text, answers):
    """Return the spans (start, end) of the answers' tokens in a text in NFD."""
    matches = list(choose_pattern(text).finditer(text))
    tokens = [match[0].lower() for match in matches]
    spans = []
    for part in map(dpr_tokens, answers):
        for first in range(len(tokens) - len(part) + 1):
            if part and tokens[first:first + len(part)] == part:
                spans.append((matches[first].start(), matches[first + len(part) - 1].end()))
    return spans


def find_patterns(text, patterns):
    """Return the spans (start, end) of the patterns' non-empty matches in a text in NFD."""
    compiled = filter(None, map(compile_pattern, patterns))
    return [match.span() for pattern in compiled for match in pattern.finditer(text)
            if match.end() > match.start()]


def contains_tokens(tokens, part):
    """Return True if the list `tokens` contains the list `part` without gaps."""
    last_start = len(tokens) - len(part)
    return any(tokens[start:start + len(part)] == part for start in range(last_start + 1))


@functools.cache
def compile_pattern(pattern):
    """Compile the regular expression of an answer with DPR's flags; return None if malformed."""
    flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
    try:
        return regex.compile(unicodedata.normalize("NFD", pattern), flags=flags)
    except regex.error:
        return None


def matches_regex(pattern, text):
    """Return True if the pattern occurs in the text; a malformed one matches nothing, as in DPR."""
    compiled = compile_pattern(pattern)
    return compiled is not None and bool(compiled.search(unicodedata.normalize("NFD", text)))


# ------------------------------------------------------------------------------------- ranked lists

def trec_order(ids, scores):
    """Return the positions of documents by descending score, as trec_eval ranks them.

    Scores are compared as float32; ties are ranked by descending id.
    """
    def sort_key(position):
        return np.float32(scores[position]), str(ids[position])

    return sorted(range(len(ids)), key=sort_key, reverse=True)


def ranking_metrics(ranking, labels, names, cutoffs, level=1):
    """Return {name@k: value} of one query's ranked documents, for all names and cutoffs k.

    names: keys of RANKING_METRICS. labels: {document: relevance}. A document is relevant if its
    label is at least `level` (trec_eval's -l); nDCG uses the labels themselves as gains. Raises
    ValueError for an unknown name.
    """
    values = {}
    for name in names:
        if name not in RANKING_METRICS:
            raise ValueError(f"unknown metric {name}")
        for k in cutoffs:
            values[f"{name}@{k}"] = RANKING_METRICS[name](ranking, labels, k, level)
    return values


def reciprocal_rank(ranking, labels, k, level=1):
    """Return 1 / rank of the first relevant document, or 0 if the first k have none."""
    relevant = relevant_documents(labels, level)
    for rank, document in enumerate(ranking[:k], 1):
        if document in relevant:
            return 1 / rank
    return 0.0


def recall(ranking, labels, k, level=1):
    """Return the fraction of the relevant documents that are among the first k."""
    relevant = relevant_documents(labels, level)
    return len(relevant.intersection(ranking[:k])) / max(1, len(relevant))


def precision(ranking, labels, k, level=1):
    """Return the number of relevant documents among the first k, divided by k.

    As in trec_eval, k is the divisor even if fewer documents were retrieved.
    """
    return len(relevant_documents(labels, level).intersection(ranking[:k])) / k


def ndcg(ranking, labels, k, level=1):
    """Return the discounted cumulative gain of the first k documents, divided by the best possible.

    A document's gain is its label, or 0 if the label is negative; `level` is not used.
    """
    best_gains = sorted((label for label in labels.values() if label > 0), reverse=True)
    if not best_gains:
        return 0.0
    gains = [max(0, labels.get(document, 0)) for document in ranking[:k]]
    return discounted_gain(gains) / discounted_gain(best_gains[:k])


def discounted_gain(gains):
    """Return the sum of the gains at ranks 1, 2, ..., each divided by log2(rank + 1)."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def average_precision(ranking, labels, k, level=1):
    """Return the mean, over all relevant documents, of the precision at the document's rank.

    A relevant document after rank k counts as 0.
    """
    relevant = relevant_documents(labels, level)
    num_relevant_so_far = 0
    precision_sum = 0.0
    for rank, document in enumerate(ranking[:k], 1):
        if document in relevant:
            num_relevant_so_far += 1
            precision_sum += num_relevant_so_far / rank
    return precision_sum / max(1, len(relevant))


def success(ranking, labels, k, level=1):
    """Return 1.0 if one of the first k documents is relevant, else 0.0."""
    return float(not relevant_documents(labels, level).isdisjoint(ranking[:k]))


def relevant_documents(labels, level=1):
    """Return the documents whose label is at least `level`."""
    return {document for document, label in labels.items() if label >= level}


def topk_accuracy(is_answering, cutoffs):
    """Return {nq@k: 1.0 if one of the first k passages contains an answer, else 0.0} (DPR).

    is_answering: has_answer of each of a question's passages, in the order of their ranks.
    """
    return {f"nq@{k}": float(any(is_answering[:k])) for k in cutoffs}


# --metrics accepts these names and nq, which is topk_accuracy
RANKING_METRICS = {"mrr": reciprocal_rank, "recall": recall, "ndcg": ndcg, "map": average_precision,
                   "success": success, "precision": precision}
METRICS = (*RANKING_METRICS, "nq")
