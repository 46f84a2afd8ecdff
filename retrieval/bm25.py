"""Search with BM25: split texts into words, make a missing index, score the documents."""
import os
import unicodedata
from contextlib import nullcontext
from typing import NamedTuple

import bm25s
import numpy as np

from records.files import lock, write_json
from retrieval.bm25_index import FORMAT, Index, build_index, open_index
from retrieval.fingerprint import (
    UNFINISHED,
    await_index,
    check_fingerprint,
    fingerprint,
    is_former_format,
    remove_other_index,
)
from retrieval.results import stack_rows
from retrieval.words import choose_rule, split_words
from utils import InputError, gather_lists, progress_bar, refusing

ROUNDING = 1e-4  # more than float32 sums of the same numbers in another order differ by
TINY = np.float32(1e-30)  # less than any score


class Words(NamedTuple):
    """Hold the settings by which documents and queries are split into words."""
    rule: str         # bm25s or unicode (split_words)
    stopwords: frozenset
    stemmer: object   # PyStemmer's stemmer, or None
    is_turkish: bool  # whether "I" and "İ" have Turkish lower cases

    def split(self, text):
        """Return the words of a text, including stop words."""
        if self.is_turkish:
            text = text.replace("I", "ı").replace("İ", "i")
        return split_words(text.lower(), self.rule, self.stopwords)


def open_words(stopwords, stemmer, rule):
    """Return the Words for the given settings. Raises InputError.

    stopwords: 'none', or one of bm25s's languages. stemmer: None, or one of PyStemmer's languages.
    rule: a rule of split_words.
    """
    is_turkish = stopwords in ("turkish", "tr") or stemmer in ("turkish", "tr")
    try:
        # the Tokenizer has bm25s's lists of stop words, by the languages' names and codes
        listed = bm25s.tokenization.Tokenizer(
            stopwords=None if stopwords == "none" else stopwords).stopwords
    except ValueError as error:
        raise InputError(f"--stopwords {error}; or give none") from None
    stopwords = frozenset(unicodedata.normalize("NFC", word) for word in listed)
    if not stemmer:
        return Words(rule, stopwords, None, is_turkish)
    try:
        import Stemmer
    except ImportError:
        raise InputError("--stemmer needs the package PyStemmer: pip install PyStemmer") from None
    try:
        return Words(rule, stopwords, Stemmer.Stemmer(stemmer), is_turkish)
    except KeyError:
        languages = ", ".join(Stemmer.algorithms())
        raise InputError(f"--stemmer {stemmer}: choose one of {languages}") from None


def tokenize_texts(texts, words):
    """Return the list of search words of each text: without stop words, stemmed."""
    rows = []
    for text in texts:
        row = [word for word in words.split(text) if word not in words.stopwords]
        rows.append(words.stemmer.stemWords(row) if words.stemmer else row)
    return rows


# ---------------------------------------------------------------- searching an index

def search_index(index, queries, k, is_main=True):
    """Return [(doc_indices, scores)], numpy arrays, of the k best documents for each query.

    Only documents with a word of the query are found. queries: a list of arrays of tokens. Equal
    scores are ordered by document index. All queries search a part before the next one is read.
    """
    best = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(queries)
    bar = progress_bar(total=len(index.parts) * len(queries), desc="searching", is_main=is_main)
    for part in index.parts:
        sums = np.zeros(part.count, np.float32)
        highest = {}  # {token: highest score of the word in this part}
        for i, tokens in enumerate(queries):
            doc_indices, scores = best[i]
            if len(scores) < k:
                documents, found = score_part(part, tokens, k)
            else:
                for token in tokens:
                    if token not in highest:
                        highest[token] = part.postings(token)[1].max(initial=0)
                most = np.array([highest[token] for token in tokens])
                documents, found = score_rivals(part, tokens, most, scores[-1], sums)
            doc_indices = np.concatenate([doc_indices, documents + part.first])
            scores = np.concatenate([scores, found])
            order = np.lexsort((doc_indices, -scores))[:k]
            best[i] = doc_indices[order], scores[order]
            bar.update()
    bar.close()
    return best


def score_part(part, tokens, k):
    """Return (documents, scores) of a part's k best documents, and of those that tie with them."""
    scores = np.zeros(part.count, np.float32)
    for token in tokens:  # in this order, as in bm25s, so that sums are rounded in the same way
        np.add.at(scores, *part.postings(token))
    # at least k documents score as high as the k-th of the highest scores of 4 k equal blocks
    size = max(1, len(scores) // (4 * k))
    highest = scores[:len(scores) // size * size].reshape(-1, size).max(1)
    documents = np.flatnonzero(scores >= max(find_kth(highest, k), TINY))
    scores = scores[documents]
    is_best = scores >= find_kth(scores, k)
    return documents[is_best], scores[is_best]


def find_kth(scores, k):
    """Return the k-th highest score, or 0 if there are fewer."""
    return np.partition(scores, len(scores) - k)[len(scores) - k] if len(scores) >= k else 0


def score_rivals(part, tokens, most, kth_score, sums):
    """Return (documents, scores) of a part's documents that score at least kth_score, and of some
    others.

    most: the highest score of each token in this part. Words are added in descending order of it,
    which puts rare words first. As soon as the other words together add less than kth_score, only
    documents with one of the words so far can reach it, and the other words are looked up for the
    few that are close enough (MaxScore, Turtle and Flood 1995). At Wikipedia's size this takes half
    the time of score_part. sums: zeros, one per document of the part, to work in; they are zeros
    again at the end.
    """
    order = np.argsort(-most, kind="stable")
    rest = np.append(np.cumsum(most[order][::-1])[::-1], 0)  # the most that words from i on add
    least = kth_score * (1 - ROUNDING)
    i, holders = 0, [np.zeros(0, np.int32)]
    while i < len(tokens) and rest[i] >= least:
        documents, scores = part.postings(tokens[order[i]])
        np.add.at(sums, documents, scores)
        holders.append(documents)
        i += 1
    holders = np.concatenate(holders)
    documents = np.sort(holders[sums[holders] >= least - rest[i]])
    documents = documents[np.diff(documents, prepend=-1) > 0]  # each once; np.unique takes longer
    close = sums[documents]
    sums[holders] = 0
    while i < len(tokens) and len(documents):
        close += look_up(part, tokens[order[i]], documents)
        i += 1
        is_close = close >= least - rest[i]
        documents, close = documents[is_close], close[is_close]
    # again in the query's order, for scores rounded as score_part's
    scores = np.zeros(len(documents), np.float32)
    for token in tokens if len(documents) else ():
        scores += look_up(part, token, documents)
    return documents, scores


def look_up(part, token, documents):
    """Return a word's scores in documents (ascending, int32), 0 where it does not occur."""
    holders, scores = part.postings(token)
    if not len(holders):
        return np.zeros(len(documents), np.float32)
    places = np.searchsorted(holders, documents)
    places[places == len(holders)] = 0
    return np.where(holders[places] == documents, scores[places], np.float32(0))


# ---------------------------------------------------------------- a whole search

class BM25Index(NamedTuple):
    """Hold what a BM25 search opens once, before the first question."""
    index: Index
    words: Words


def open_bm25(settings, corpus, world):
    """Return the BM25Index of a SearchSettings (retrieval/search.py), built if it is missing."""
    bm25 = settings.bm25
    rule, share = bm25.bm25_words, None
    if rule == "auto":
        rule, share = choose_rule(corpus)
    words = open_words(bm25.stopwords, bm25.stemmer, rule)
    make_missing_index(settings, corpus, words, share, world)
    return BM25Index(open_index(settings.index, len(corpus)), words)


def make_missing_index(settings, corpus, words, share, world):
    """Build the index in settings.index if it is missing or unfinished.

    Raises InputError for another index. share: see log_words.
    """
    bm25, folder = settings.bm25, settings.index
    made_with = {"model": "bm25", "k1": bm25.k1, "b": bm25.b, "stopwords": bm25.stopwords,
                 "stemmer": bm25.stemmer, "template": corpus.template, "words": words.rule,
                 "format": FORMAT}
    expected = fingerprint(corpus, None, made_with, world)
    if world.is_main and is_former_format(folder, expected):
        world.log(f"{folder}: holds an index in an earlier version's format; it is made again")
        remove_other_index(folder, expected)
    if settings.overwrite_index and world.is_main:
        remove_other_index(folder, expected)
    is_missing = world.is_main and not check_fingerprint(folder, expected)
    with lock(folder) if is_missing else nullcontext():
        # another command may have made the index while this one waited for the lock
        is_missing = is_missing and not check_fingerprint(folder, expected)
        if is_missing:
            log_words(words, bm25.stopwords, share, world.log)
            write_json(os.path.join(folder, UNFINISHED), expected)
        if any(gather_lists([is_missing], world)):
            build_index(folder, corpus, words, bm25.k1, bm25.b, world)
    await_index(folder, expected, world)


def log_words(words, stopwords, share, log):
    """Log how texts are split into words, and why.

    share: share of the characters that need the rule unicode (choose_rule); None if --bm25_words
    names the rule.
    """
    kinds = {"bm25s": "two or more letters or digits",
             "unicode": "Unicode letters with their marks, in pairs for scripts without spaces"}
    reason = ""
    if share is not None:
        percent = float(f"{100 * share:.2g}")  # prints 100, not 1e+02
        reason = f", chosen because {percent:g} % of the documents' characters need unicode"
    log(f"BM25: words are {kinds[words.rule]} (--bm25_words {words.rule}{reason}); stop words: "
        f"{stopwords} (--stopwords)")


def search_words(settings, bm25_index, questions, world):
    """Return the Results of questions in a BM25Index; each process scores a strided share."""
    index, words = bm25_index
    share = range(world.rank, len(questions), world.size)
    rows = tokenize_texts([questions[i].text for i in share], words)
    with refusing(f"{settings.index}: the index is broken", "delete the folder"):
        queries = [index.tokens(row) for row in rows]
        found = search_index(index, queries, settings.hits, world.is_main)
    rows = [(i, doc_indices, scores) for i, (doc_indices, scores) in zip(share, found)]
    return stack_rows(gather_lists(rows, world))
