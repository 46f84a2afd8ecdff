"""Search with BM25 by bm25s: build the index of a corpus, store it in a folder, open and search it.
"""
import sys
import unicodedata
from array import array
from typing import NamedTuple

import bm25s
import numpy as np

from records.files import save_folder
from retrieval.words import split_words
from utils import InputError, progress_bar, refusing


class Words(NamedTuple):
    """Hold the settings by which documents and queries are split into words."""
    rule: str         # of split_words
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
    rule: of split_words.
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
