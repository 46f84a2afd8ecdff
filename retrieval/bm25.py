"""Build, store, open and search BM25 indices with bm25s.
"""
import os
import sys
import unicodedata
from array import array
from typing import NamedTuple

import bm25s
import numpy as np

from records.files import lock, save_folder, write_json
from retrieval.fingerprint import (
    await_index,
    check_fingerprint,
    fingerprint,
    remove_other_index,
)
from retrieval.results import stack_rows
from retrieval.words import choose_rule, split_words
from utils import InputError, gather_lists, progress_bar, refusing


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


class TokenLists:
    """Hold a corpus in the form that bm25s accepts: token ids, 4 bytes each, and a vocabulary."""

    def __init__(self, tokenizer, corpus):
        self.flat = array("i")       # the token ids of all documents, one after another
        self.ends = array("q", [0])  # where each document ends in `flat`
        indices = progress_bar(range(len(corpus)), desc="tokenizing")
        texts = (corpus.text(doc_index) for doc_index in indices)
        for token_ids in tokenizer.streaming_tokenize(texts, allow_empty=False):
            self.flat.extend(token_ids)
            self.ends.append(len(self.flat))
        self.ids = self  # bm25s reads the attributes `ids` and `vocab`
        self.vocab = tokenizer.get_vocab_dict()

    def __len__(self):
        return len(self.ends) - 1

    def __iter__(self):
        for start, end in zip(self.ends, self.ends[1:]):
            yield self.flat[start:end]


def build_bm25_index(folder, corpus, words, k1, b):
    """Build the index of a corpus in a folder.

    Raises InputError if no document has a word, or the index cannot be written completely.
    """
    tokenizer = bm25s.tokenization.Tokenizer(lower=False, splitter=words.split,
                                             stopwords=words.stopwords, stemmer=words.stemmer)
    tokens = TokenLists(tokenizer, corpus)
    if not tokens.flat:
        raise InputError(f"{corpus.parts[0].path}: no document has a word except stop words; use "
                         "--stopwords none, or another --key_template")
    index = bm25s.BM25(k1=k1, b=b)
    index.index(tokens, show_progress=sys.stderr.isatty())

    def save(temporary):
        index.save(temporary)
        bm25s.BM25.load(temporary, mmap=True)  # index.save uses np.save, which ignores a full disk
    try:
        save_folder(folder, save)
    except ValueError:
        raise InputError(f"{folder}: the index could not be written completely; make "
                         "room") from None


def load_bm25_index(folder, count):
    """Return the folder's index of `count` documents, with mapped arrays.

    Raises InputError if it is broken.
    """
    with refusing(f"{folder}: bm25s cannot open the index", "copy it again, or delete the folder"):
        index = bm25s.BM25.load(folder, mmap=True)
        check_index(index, count)
        search_bm25_index(index, list(index.vocab_dict)[:1], 1)  # fails if its settings are wrong
        return index


def check_index(index, count):
    """Raise ValueError for an index whose parts do not belong together."""
    data, indices, indptr = (index.scores[name] for name in ("data", "indices", "indptr"))
    if index.scores["num_docs"] != count:
        raise ValueError(f"it has {index.scores['num_docs']} documents, the corpus has {count}")
    kinds = data.dtype.kind + indices.dtype.kind + indptr.dtype.kind
    if kinds != "fii" or not len(data) == len(indices) == indptr[-1] or np.diff(indptr).min() < 0:
        raise ValueError("its arrays do not belong together")
    tokens = index.vocab_dict.values()
    if not all(type(token) is int and 0 <= token < len(indptr) for token in tokens):
        raise ValueError("its vocabulary belongs to another index")


def tokenize_texts(texts, words):
    """Return the list of search words of each text: without stop words, stemmed."""
    rows = []
    for text in texts:
        row = [word for word in words.split(text) if word not in words.stopwords]
        rows.append(words.stemmer.stemWords(row) if words.stemmer else row)
    return rows


def search_bm25_index(index, query_words, k):
    """Return (doc_indices, scores), numpy arrays, of the k best documents with a word of the query.

    Equal scores are ordered by document index.
    """
    scores = index.get_scores_from_ids(index.get_tokens_ids(query_words))
    kth_from_end = max(len(scores) - k, 0)
    kth_score = np.partition(scores, kth_from_end)[kth_from_end]
    candidates = np.flatnonzero((scores >= kth_score) & (scores > 0))  # k, and ties with the k-th
    best = np.lexsort((candidates, -scores[candidates]))[:k]
    doc_indices = candidates[best]
    return doc_indices, scores[doc_indices]


# ---------------------------------------------------------------- a whole search

class BM25Index(NamedTuple):
    """Hold what a BM25 search opens once, before the first question."""
    index: object  # bm25s.BM25
    words: Words


def open_bm25(settings, corpus, world):
    """Return the BM25Index of a SearchSettings (retrieval/search.py), built if it is missing."""
    bm25 = settings.bm25
    rule, share = bm25.bm25_words, None
    if rule == "auto":
        rule, share = choose_rule(corpus)
    words = open_words(bm25.stopwords, bm25.stemmer, rule)
    make_missing_index(settings, corpus, words, share, world)
    return BM25Index(load_bm25_index(settings.index, len(corpus)), words)


def make_missing_index(settings, corpus, words, share, world):
    """Build the index in settings.index if it is missing. Raises InputError for another index.

    share: see log_words.
    """
    bm25 = settings.bm25
    made_with = {"model": "bm25", "k1": bm25.k1, "b": bm25.b, "stopwords": bm25.stopwords,
                 "stemmer": bm25.stemmer, "template": corpus.template, "words": words.rule}
    expected = fingerprint(corpus, None, made_with, world)
    if settings.overwrite_index and world.is_main:
        remove_other_index(settings.index, expected)
    if world.is_main and not check_fingerprint(settings.index, expected):
        with lock(settings.index):
            # another command may have made the index while this one waited for the lock
            if not check_fingerprint(settings.index, expected):
                log_words(words, bm25.stopwords, share, world.log)
                build_bm25_index(settings.index, corpus, words, bm25.k1, bm25.b)
                write_json(os.path.join(settings.index, "index.json"), expected)
    await_index(settings.index, expected, world)


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
    token_lists = tokenize_texts([questions[i].text for i in share], words)
    rows = []
    for i, tokens in zip(progress_bar(share, desc="searching", is_main=world.is_main), token_lists):
        with refusing(f"{settings.index}: the index is broken", "delete the folder"):
            doc_indices, scores = search_bm25_index(index, tokens, settings.hits)
        rows.append((i, doc_indices, scores))
    return stack_rows(gather_lists(rows, world))
