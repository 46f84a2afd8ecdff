"""Candidates that records bring along, and collated files made of results, as LLM-Embedder has
them.

The files hold mined positives, negatives, keys, or teacher scores. A candidate is known by its
index among the record's candidates; it may also be a document of the corpus.
"""
import json
import math
import os
from typing import NamedTuple

from metrics import has_answer
from records.fields import (
    LIST_FIELDS,
    check_types,
    find_keys,
    gold_passages,
    has_keys,
    labelled_keys,
)
from records.files import new_file
from records.names import (
    DOCUMENT_ID_NAMES,
    HARD_NEGATIVE_NAMES,
    OTHER_NEGATIVE_NAMES,
    POSITIVE_ID_NAMES,
    POSITIVE_NAMES,
    TEXT_NAMES,
    find_name,
    find_value,
    fold,
    spell_id,
)
from records.templates import format_key
from retrieval.results import stack
from utils import InputError, shorten

# {what --metrics asks for: the middle of the file's name}
COLLATED = {"collate_pos": "pos", "collate_neg": "neg", "collate_key": "key",
            "collate_score": "scored"}
OLD_SCORES = ("pos_scores", "neg_scores")  # FlagEmbedding's, of keys that are replaced


# ---------------------------------------------------------------- candidates

def list_candidates(record, scored=False):
    """Return (keys, document indices) of a record's candidates, the first of these fields that it
    has:

        keys            document indices
        key             key_index
        positive_ctxs   none: DPR's form, see labelled_keys
        history         history_index
        pos and neg     pos_index and neg_index

    The indices are None unless every candidate has one. With `scored` the candidates are those
    that teacher_scores belong to in training: `key` then comes last.
    """
    has_others = has_keys(record)
    if record.get("key") is not None and not (scored and has_others):
        fields = ["key"]
    elif record.get("positive_ctxs") is not None:
        positives, negatives = labelled_keys(record)
        return positives + negatives, None
    elif record.get("history") is not None:
        fields = ["history"]
    else:
        fields = ["pos", "neg"]
    keys, doc_indices = [], []
    for field in fields:
        doc_indices += record.get(f"{field}_index") or []
    if fields == ["pos", "neg"]:
        positives, negatives = labelled_keys(record)
        keys = [*positives, *negatives]
    else:
        keys = record.get(fields[0]) or []
    return keys, doc_indices if len(doc_indices) == len(keys) else None


def check_candidates(questions, corpus, template, need_indices, scored=False):
    """Raise InputError for candidates that are no keys, or lack a document index they need."""
    if questions and not any(question.record.get("key") or has_keys(question.record)
                             for question in questions):
        raise InputError("no question has candidates, in 'key', 'positive_ctxs', 'history', or "
                         "'pos' and 'neg'; give some, or rank an earlier result with --results")
    for question in questions:
        check_types(question.record, question.location,
                    ["key", "key_index", "history", "history_index"])
        keys, doc_indices = list_candidates(question.record, scored)
        key_texts(question, keys, template)
        if need_indices and keys and doc_indices is None:
            raise InputError(f"{question.location}: not every candidate has its index in "
                             "'key_index', or 'pos_index' and 'neg_index'; only the collated files "
                             "can do without, or rank an earlier result with --results")
        if need_indices or corpus:
            check_indices(question, doc_indices or [], corpus)


def check_indices(question, doc_indices, corpus):
    """Raises InputError for an index that is none of a document of the corpus."""
    for doc_index in doc_indices:
        is_index = type(doc_index) is int and doc_index >= 0
        if not is_index or (corpus and doc_index >= len(corpus)):
            raise InputError(f"{question.location}: {shorten(doc_index)} is the index of no "
                             "document of the corpus; is it the corpus of this file?")


def key_texts(question, keys, template):
    """The texts of a question's keys. Raises InputError for one that does not fit the template."""
    return [format_key(key, template, question.location) for key in keys]


def list_positives(record):
    """Return all keys that a record names as its positives, under any of their names."""
    return [key for name in POSITIVE_NAMES for key in find_keys(record, [name])]


def to_documents(questions, results):
    """Results by document index, of results by index among each record's candidates."""
    rows = []
    for i, question in enumerate(questions):
        indices, scores = results.row(i)
        _, doc_indices = list_candidates(question.record)
        rows.append((i, [doc_indices[index] for index in indices], scores))
    return stack(rows)


# ---------------------------------------------------------------- collated files

def collated_paths(args):
    """{kind of collated file: path} beside --eval_data."""
    name = args.save_name or args.retrieval_method
    return {kind: collated_path(args.eval_data, middle, name) for kind, middle in COLLATED.items()}


def collated_path(path, middle, name):
    """The path of a collated file, as in LLM-Embedder: records.json to records.MIDDLE.NAME.json."""
    stem, ending = os.path.splitext(str(path).removesuffix(".gz"))
    if ending not in (".json", ".jsonl"):  # a table's; the collated file holds records
        ending = ".json"
    return f"{stem}.{middle}.{name}{ending}"


class NegativeLimits(NamedTuple):
    """Which hits may be hard negatives. A positive's score is that of its own hit."""
    ranks: object = None            # (first, last), from 1, of the search's result
    max_score: object = None        # a hit's score is this at most
    margin: object = None           # and this much below the positive's score at least
    relative_margin: object = None  # and this share of the positive's score below it at least

    def needs_positive(self):
        """Return True if a limit goes by the positive's score."""
        return self.margin is not None or self.relative_margin is not None

    def allow(self, rank, score, positive_score):
        """Return True for a hit within the limits.

        positive_score is None if no positive is among the hits: none of them is known to be below
        it then.
        """
        if self.ranks is not None and not self.ranks[0] <= rank <= self.ranks[1]:
            return False
        highest = math.inf if self.max_score is None else self.max_score
        if self.needs_positive():
            if positive_score is None:
                return False
            relative = abs(positive_score) * (self.relative_margin or 0)
            highest = min(highest, positive_score - (self.margin or 0), positive_score - relative)
        return score <= highest


NO_LIMITS = NegativeLimits()


def read_limits(args):
    """Return the NegativeLimits of the flags."""
    return NegativeLimits(args.neg_ranks, args.neg_max_score, args.neg_margin,
                          args.neg_relative_margin)


def write_collated(kind, path, questions, results, corpus, labels, args, are_candidates, log=print):
    """Write one of LLM-Embedder's files: each question's record with fields replaced.

        kind           the record gets
        collate_key    the hits as `key`
        collate_neg    the hits that are no positives as `neg` (as `hard_negative_ctxs` in a record
                       in DPR's form); old teacher_scores are dropped, and questions without hits
        collate_score  the scores of all candidates as `teacher_scores`

    labels: {document index: label} per question. are_candidates: the results go by index among each
    record's candidates, not by document. args: key_template, max_neg_num, filter_answers, match and
    those of read_limits. Logs how many questions have no negative.
    """
    without = []
    with new_file(path) as file:
        for i, question in enumerate(questions):
            record = dict(question.record)
            indices, scores = results.row(i)
            if kind == "collate_score":
                by_candidate = sorted(zip(indices, scores))
                record["teacher_scores"] = [score for _, score in by_candidate]
            elif kind == "collate_key":
                hits = read_hits(question, indices, corpus, are_candidates, args.key_template)
                put_hits(record, "key", hits)
            else:
                hits = read_hits(question, indices, corpus, are_candidates, args.key_template)
                if not hits:
                    continue
                negatives = keep_negatives(question, hits, corpus, labels[i], args.key_template,
                                           args.filter_answers, scores, read_limits(args),
                                           args.match == "regex")
                if not negatives:
                    without.append(question)
                put_negatives(record, negatives[:args.max_neg_num], corpus)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if without:
        log(f"note: {len(without)} of {len(questions)} questions have no hard negative among their "
            f"hits (first: {shorten(without[0].id)})")


def write_positives(path, questions, results, corpus, marks, max_neg_num, log, limits=NO_LIMITS):
    """Write DPR's training records of questions and answers, as DPR's were made (sections 3.2 and
    4.2): the highest hit that holds an answer is the positive, the highest that hold none are the
    hard negatives, within the limits.

    Questions without a positive are dropped; logs how many. Positives, negatives and teacher scores
    that a record had are replaced. marks: what measures.mark_answers returns.
    """
    num_positives = 0
    with new_file(path) as file:
        for i, question in enumerate(questions):
            own_text = normalise(question.text)
            hits = zip(range(1, len(results.indices[i]) + 1), *results.row(i), marks[i] or [])
            marked = [hit for hit in hits if own_text not in spell_document(hit[1], "", corpus)]
            positives = [(doc_index, score) for _, doc_index, score, holds in marked if holds]
            if not positives:
                continue
            num_positives += 1
            positive, positive_score = positives[0]
            negatives = [doc_index for rank, doc_index, score, holds in marked
                         if not holds and limits.allow(rank, score, positive_score)]
            kept = {name: value for name, value in question.record.items()
                    if name not in (*LIST_FIELDS, "teacher_scores")}
            record = {"id": question.id, "question": question.text, **kept,
                      "positive_ctxs": [corpus_context(positive, corpus)],
                      "hard_negative_ctxs": [corpus_context(doc_index, corpus)
                                             for doc_index in negatives[:max_neg_num]]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    num_unanswered = sum(not question.answers for question in questions)
    num_missed = len(questions) - num_positives - num_unanswered
    log(f"collate_pos: {path}")
    log(f"{num_positives} of {len(questions)} questions got a positive; dropped: {num_missed} "
        f"whose hits hold no answer, {num_unanswered} without answers")


def read_hits(question, indices, corpus, are_candidates, template):
    """[(document index or None, text)] of hits: documents, or candidates of the record."""
    if not are_candidates:
        return [(doc_index, corpus.text(doc_index)) for doc_index in indices]
    keys, doc_indices = list_candidates(question.record)
    if doc_indices is None:
        doc_indices = [None] * len(keys)
    texts = key_texts(question, [keys[index] for index in indices], template)
    return [(doc_indices[index], text) for index, text in zip(indices, texts)]


def put_hits(record, field, hits):
    """Sets a record's neg or key, and their document indices if all have one."""
    record.pop(f"{field}_index", None)
    record[field] = [text for _, text in hits]
    if all(doc_index is not None for doc_index, _ in hits):
        record[f"{field}_index"] = [doc_index for doc_index, _ in hits]


def put_negatives(record, negatives, corpus):
    """Set a record's negatives in the form that it is in: DPR's, Tevatron's or LLM-Embedder's."""
    record.pop("teacher_scores", None)  # they were of the old negatives
    if "positive_ctxs" in record:
        record["hard_negative_ctxs"] = [dpr_context(*negative, corpus) for negative in negatives]
        return
    positives = find_name(record, POSITIVE_NAMES)
    for name in list(record):
        if find_name([name], (*HARD_NEGATIVE_NAMES, *OTHER_NEGATIVE_NAMES, *OLD_SCORES)):
            del record[name]
    if positives is not None and fold(positives) == fold("positive_passages"):
        contexts = [dpr_context(*negative, corpus) for negative in negatives]
        record["negative_passages"] = [{("docid" if name == "passage_id" else name): value
                                        for name, value in context.items()} for context in contexts]
    else:
        put_hits(record, "neg", negatives)


def dpr_context(doc_index, text, corpus):
    """A hit as DPR's files have it."""
    if doc_index is None or not corpus:
        return {"title": "", "text": text}
    return corpus_context(doc_index, corpus)


def corpus_context(doc_index, corpus):
    """A document of the corpus as DPR's files have it."""
    passage = corpus.passage(doc_index)
    return {"title": passage["title"], "text": passage["text"], "passage_id": passage["id"]}


def keep_negatives(question, hits, corpus, labels, template, filter_answers, scores=None,
                   limits=NO_LIMITS, is_regex=False):
    """Return the hits [(document index, text)] that are no positives nor the question's own text,
    and are within the limits; with filter_answers, only those that hold no answer.

    A text holds an answer, as in LLM-Embedder, if the answer is a substring of it, both in lower
    case; with is_regex, if the pattern matches. scores: of the hits, where limits need them. A
    positive's score is its hit's, the lowest of several.
    """
    are_positives = find_positives(question, hits, corpus, labels, template)
    own_text = normalise(question.text)
    scores = [0.0] * len(hits) if scores is None else scores
    positive_score = min((score for score, is_positive in zip(scores, are_positives)
                          if is_positive), default=None)
    kept = []
    for rank, ((doc_index, text), score, is_positive) in enumerate(zip(hits, scores, are_positives),
                                                                   1):
        is_own = own_text and own_text in spell_document(doc_index, text, corpus)
        holds_answer = filter_answers and holds_string(text, question.answers, is_regex)
        if not (is_positive or is_own or holds_answer) and limits.allow(rank, score,
                                                                        positive_score):
            kept.append((doc_index, text))
    return kept


def holds_string(text, answers, is_regex):
    """Return True if an answer is a substring of a text, in lower case, or its pattern matches."""
    if is_regex:
        return has_answer(text, answers, is_regex)
    return any(answer.lower() in text.lower() for answer in answers)


def find_positives(question, hits, corpus, labels, template):
    """Return [True for a positive] of hits [(document index, text)].

    A positive is known by its text, its index in `pos_index`, its label or its id, by any of the
    names of either; so are a copy of it in the corpus, and a reader's record's `passage`.
    """
    positives = list_positives(question.record)
    gold = gold_passages(question.record, question.location)
    positive_texts = {normalise(passage["text"]) for passage in gold}
    for key, text in zip(positives, key_texts(question, positives, template)):
        positive_texts.update(map(normalise, (text, plain_text(key))))
    positive_indices = {doc_index for doc_index, label in labels.items() if label > 0}
    positive_indices.update(question.record.get("pos_index") or [])
    if corpus:
        ids = [find_value(key, DOCUMENT_ID_NAMES) for key in [*positives, *gold]
               if isinstance(key, dict)]
        named = find_value(question.record, POSITIVE_ID_NAMES)
        ids += named if isinstance(named, list) else []
        ids = [spell_id(document_id) for document_id in ids if document_id is not None]
        positive_indices.update(corpus.indices(ids))
        positive_texts.update(normalise(corpus.text(doc_index)) for doc_index in positive_indices
                              if doc_index >= 0)
    positive_texts.discard("")
    return [doc_index in positive_indices
            or not positive_texts.isdisjoint(spell_document(doc_index, text, corpus))
            for doc_index, text in hits]


def normalise(text):
    """Return a text by which equal ones are known: its words, in small letters, with one blank."""
    return " ".join(text.split()).casefold()


def plain_text(key):
    """Return the text of a key without its title, "" for an object without a text."""
    if isinstance(key, str):
        return key
    text = find_value(key, TEXT_NAMES) if isinstance(key, dict) else None
    return text if isinstance(text, str) else ""


def spell_document(doc_index, text, corpus):
    """Return {normalised text} of a hit: as the template has it, and without and with its title."""
    spellings = {normalise(text)}
    if corpus and doc_index is not None:
        passage = corpus.passage(doc_index)
        spellings |= {normalise(passage["text"]),
                      normalise(f"{passage['title']} {passage['text']}")}
    return spellings
