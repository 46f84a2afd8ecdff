"""Measures of answers, as DPR and FiD define them, and of ranked lists, as in trec_eval."""
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

# Letters of scripts that are written without blanks between words (lb=SA: Thai, Lao, Khmer, Burmese
# and their like), and Hangul, whose words carry their particles. Where words are compared, each of
# these letters, with its marks, is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{lb=SA}\u30fc"
UNSPACED_LETTER = regex.compile(f"[{UNSPACED}]")
UNSPACED_TOKEN = regex.compile(rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+|(?=[{UNSPACED}])\X"
                               r"|[^\p{Z}\p{C}]", flags=regex.VERSION1)
UNSPACED_WORD = regex.compile(rf"(?=[{UNSPACED}])\X|[^\s{UNSPACED}]+")
ANY_PUNCTUATION = regex.compile(r"\p{P}")


# ------------------------------------------------------------------------------------------ answers

def normalize_answer(text):
    """Return a text in lower case, without ASCII punctuation and articles, with single blanks.

    The steps are SQuAD v1.1's in its order. As in FiD and DPR, the module regex finds the articles:
    a combining mark belongs to its word there, while SQuAD's module re ends a word before it.
    """
    text = text.lower().translate(PUNCTUATION)
    text = regex.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def has_unspaced(text):
    """Return True for a text with letters of a script without blanks between words."""
    return not text.isascii() and UNSPACED_LETTER.search(text) is not None


def exact_match(prediction, answers):
    """Return 1.0 if the normalised prediction equals a normalised gold answer (FiD), else 0.0.

    As in FiD, texts are not brought to one Unicode form: NFC and NFD of a letter differ.
    """
    prediction = normalize_answer(prediction)
    return float(any(prediction == normalize_answer(answer) for answer in answers))


def f1(prediction, answers):
    """Return the largest F1 between the words of the prediction and of one gold answer (SQuAD
    v1.1), both as normalize_answer returns them.

    In a text with UNSPACED letters each of them is a word, and punctuation of any script is left
    out, as in MLQA, DRCD and KorQuAD.
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
    """Return 1.0 if a prediction begins with a match of one of the regular expressions, as in DrQA,
    else 0.0.
    """
    text = unicodedata.normalize("NFD", prediction)
    return float(any(pattern.match(text) for pattern in map(compile_pattern, patterns) if pattern))


# ----------------------------------------------------------------------------------------- passages

def dpr_tokens(text):
    """Return the lower-cased tokens of DPR's SimpleTokenizer.

    A token is a run of letters, digits and marks, or one other symbol; the text is brought to
    Unicode's form NFD first. UNSPACED letters are tokens of their own, which DPR has not: a run of
    Chinese letters is a sentence, and answers are a part of it.
    """
    text = unicodedata.normalize("NFD", text)
    return [token.lower() for token in choose_pattern(text).findall(text)]


def choose_pattern(text):
    """Return the pattern of a text's tokens."""
    return UNSPACED_TOKEN if has_unspaced(text) else DPR_TOKEN


def has_answer(text, answers, is_regex=False):
    """Return True if one answer's tokens stand side by side in the passage's text (DPR).

    The title is not searched. With `is_regex` each answer is a regular expression, searched in the
    raw text (CuratedTREC; DPR's --match regex).
    """
    if is_regex:
        return any(matches_regex(pattern, text) for pattern in answers)
    tokens = dpr_tokens(text)
    return any(contains_tokens(tokens, dpr_tokens(answer)) for answer in answers)


def find_answers(text, answers, is_regex=False):
    """Return [(start, end)] of the places in a text where has_answer finds an answer, in order,
    overlapping ones as one.
    """
    decomposed = unicodedata.normalize("NFD", text)
    spans = find_patterns(decomposed, answers) if is_regex else find_tokens(decomposed, answers)
    if not spans:
        return []
    # origins[i] is the place in the text that character i of its form NFD comes from
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
    """Return the (start, end) of every place in a text, in form NFD, with an answer's tokens."""
    matches = list(choose_pattern(text).finditer(text))
    tokens = [match[0].lower() for match in matches]
    spans = []
    for part in map(dpr_tokens, answers):
        for first in range(len(tokens) - len(part) + 1):
            if part and tokens[first:first + len(part)] == part:
                spans.append((matches[first].start(), matches[first + len(part) - 1].end()))
    return spans


def find_patterns(text, patterns):
    """Return the (start, end) of every match, not an empty one, of a pattern in a text in NFD."""
    compiled = filter(None, map(compile_pattern, patterns))
    return [match.span() for pattern in compiled for match in pattern.finditer(text)
            if match.end() > match.start()]


def contains_tokens(tokens, part):
    """True if the list `part` stands, as a whole, somewhere in the list `tokens`."""
    last_start = len(tokens) - len(part)
    return any(tokens[start:start + len(part)] == part for start in range(last_start + 1))


@functools.cache
def compile_pattern(pattern):
    """Return the compiled regular expression of an answer with DPR's flags, None if malformed."""
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
    """Return the positions of documents by falling score, as trec_eval ranks them.

    Scores are compared as float32; equal ones are ranked by falling id.
    """
    def sort_key(position):
        return np.float32(scores[position]), str(ids[position])

    return sorted(range(len(ids)), key=sort_key, reverse=True)


def ranking_metrics(ranking, labels, names, cutoffs, level=1):
    """Return {name@k: value} of one query's ranked documents, for all names and cutoffs k.

    The names are keys of RANKING_METRICS, labels is {document: relevance}. A document is relevant
    if its label is at least `level` (trec_eval's -l); nDCG's gains are the labels at any level.
    Raises ValueError for an unknown name.
    """
    values = {}
    for name in names:
        if name not in RANKING_METRICS:
            raise ValueError(f"unknown metric {name}")
        for k in cutoffs:
            values[f"{name}@{k}"] = RANKING_METRICS[name](ranking, labels, k, level)
    return values


def reciprocal_rank(ranking, labels, k, level=1):
    """Return 1 / the rank of the first relevant document, 0 if it is below rank k."""
    relevant = relevant_documents(labels, level)
    for rank, document in enumerate(ranking[:k], 1):
        if document in relevant:
            return 1 / rank
    return 0.0


def recall(ranking, labels, k, level=1):
    """Return the share of the relevant documents that are among the first k."""
    relevant = relevant_documents(labels, level)
    return len(relevant.intersection(ranking[:k])) / max(1, len(relevant))


def precision(ranking, labels, k, level=1):
    """Return the number of relevant documents among the first k, divided by k.

    As in trec_eval, k is the divisor even where fewer documents were retrieved.
    """
    return len(relevant_documents(labels, level).intersection(ranking[:k])) / k


def ndcg(ranking, labels, k, level=1):
    """Return the discounted cumulative gain of the first k documents over the best ranking's.

    A document's gain is its label, a negative one counting as 0; `level` is not used.
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
    """Return the mean, over all relevant documents, of the precision at each one's rank.

    Relevant documents below rank k have a precision of 0.
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
    """{nq@k: 1.0 if one of the first k passages holds an answer, else 0.0} of one question (DPR).

    is_answering: has_answer of every passage, in the order of their ranks.
    """
    return {f"nq@{k}": float(any(is_answering[:k])) for k in cutoffs}


# what --metrics may name: those of ranking_metrics, and nq, which is topk_accuracy
RANKING_METRICS = {"mrr": reciprocal_rank, "recall": recall, "ndcg": ndcg, "map": average_precision,
                   "success": success, "precision": precision}
METRICS = (*RANKING_METRICS, "nq")
