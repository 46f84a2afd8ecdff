"""Candidates in records, and collated files: records with results, in LLM-Embedder's form.

Collated files hold mined positives, mined negatives, keys or teacher scores. A candidate is
identified by its position in the record; it may also be a document of the corpus.
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
from records.questions import Question
from records.templates import format_key
from retrieval.results import CandidateResults, stack_rows
from utils import InputError, shorten

# {name in --metrics: middle of the file's name}
COLLATED = {"collate_pos": "pos", "collate_neg": "neg", "collate_key": "key",
            "collate_score": "scored"}
OLD_SCORES = ("pos_scores", "neg_scores")  # FlagEmbedding's scores of keys that are replaced


# ---------------------------------------------------------------- candidates

def list_candidates(record, scored=False):
    """Return (keys, document indices) of a record's candidates, from the first field that it has:

        keys            document indices
        key             key_index
        positive_ctxs   no index: DPR's form, see labelled_keys
        history         history_index
        pos and neg     pos_index and neg_index

    The indices are None unless every candidate has one. scored: return the candidates of
    teacher_scores in training, which are `key` only if there are no others.
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
    """Raise InputError for candidates that are not keys, or that lack a needed document index."""
    if questions and not any(question.record.get("key") or has_keys(question.record)
                             for question in questions):
        raise InputError("no question has candidates, in 'key', 'positive_ctxs', 'history', or "
                         "'pos' and 'neg'; give some, or rank an earlier result with --results")
    for question in map(Question.read, questions):
        check_types(question.record, question.location,
                    ["key", "key_index", "history", "history_index"])
        keys, doc_indices = list_candidates(question.record, scored)
        key_texts(question, keys, template)
        if need_indices and keys and doc_indices is None:
            raise InputError(f"{question.location}: not every candidate has its index in "
                             "'key_index', or 'pos_index' and 'neg_index'; only collated files "
                             "work without it, or rank an earlier result with --results")
        if need_indices or corpus:
            check_indices(question, doc_indices or [], corpus)


def check_indices(question, doc_indices, corpus):
    """Raise InputError for an index outside the corpus."""
    for doc_index in doc_indices:
        is_index = type(doc_index) is int and doc_index >= 0
        if not is_index or (corpus and doc_index >= len(corpus)):
            raise InputError(f"{question.location}: {shorten(doc_index)} is the index of no "
                             "document of the corpus; give the corpus of this file")


def key_texts(question, keys, template):
    """Return the texts of a question's keys. Raises InputError for one that does not fit the
    template.
    """
    return [format_key(key, template, question.location) for key in keys]


def list_positives(record):
    """Return all keys that a record lists as positives, under any accepted name."""
    return [key for name in POSITIVE_NAMES for key in find_keys(record, [name])]


def to_documents(questions, results):
    """Convert CandidateResults, whose candidates all have a document index, to Results."""
    rows = []
    for i, question in enumerate(questions):
        positions, scores = results.row(i)
        _, doc_indices = list_candidates(question.record)
        rows.append((i, [doc_indices[position] for position in positions], scores))
    return stack_rows(rows)


# ---------------------------------------------------------------- limits of negatives

class NegativeLimits(NamedTuple):
    """Hold the limits of hard negatives. A positive's score is that of its hit in the search."""
    ranks: object = None            # (first, last) rank in the search's result, counted from 1
    max_score: object = None        # highest score of a negative
    margin: object = None           # a negative scores at least this much below the positive
    relative_margin: object = None  # like margin, as a share of the positive's score

    def allow(self, rank, score, positive_score):
        """Return True for a hit within the limits.

        positive_score: None if no positive is among the hits. A margin then allows no hit.
        """
        if self.ranks is not None and not self.ranks[0] <= rank <= self.ranks[1]:
            return False
        highest = math.inf if self.max_score is None else self.max_score
        if self.margin is not None or self.relative_margin is not None:
            if positive_score is None:
                return False
            relative = abs(positive_score) * (self.relative_margin or 0)
            highest = min(highest, positive_score - (self.margin or 0), positive_score - relative)
        return score <= highest


NO_LIMITS = NegativeLimits()


# ---------------------------------------------------------------- collated files

def collated_path(eval_data, kind, name):
    """Return the path of a collated file, as LLM-Embedder names it: records.json becomes
    records.MIDDLE.NAME.json.
    """
    stem, ending = os.path.splitext(str(eval_data).removesuffix(".gz"))
    if ending not in (".json", ".jsonl"):  # a table; the collated file holds records
        ending = ".json"
    return f"{stem}.{COLLATED[kind]}.{name}{ending}"


def write_teacher_scores(path, questions, results):
    """Write collate_score's file: records with the scores of all candidates as teacher_scores."""
    with new_file(path) as file:
        for i, question in enumerate(questions):
            by_position = sorted(zip(*results.row(i)))
            scores = [score for _, score in by_position]
            write_record(file, question.record | {"teacher_scores": scores})


def write_keys(path, questions, results, corpus, template):
    """Write collate_key's file: records with the hits as `key`."""
    with new_file(path) as file:
        for i, question in enumerate(map(Question.read, questions)):
            record = dict(question.record)
            put_hits(record, "key", list_hits(results, i, question, corpus, template))
            write_record(file, record)


def write_negatives(path, questions, results, corpus, labels, template, limits=NO_LIMITS,
                    max_count=100, filter_answers=False, is_regex=False, log=print):
    """Write collate_neg's file: records with the hits that are not positives as negatives.

    Old teacher_scores are dropped, and so are questions without hits. Logs how many questions get
    no negative. labels: per question, {document index: label}. limits, filter_answers, is_regex:
    see keep_negatives.
    """
    without = []
    with new_file(path) as file:
        for i, question in enumerate(map(Question.read, questions)):
            hits = list_hits(results, i, question, corpus, template)
            if not hits:
                continue
            negatives = keep_negatives(question, hits, results.row(i)[1], corpus, labels[i],
                                       template, limits, filter_answers, is_regex)
            if not negatives:
                without.append(question.id)
            record = dict(question.record)
            put_negatives(record, negatives[:max_count], corpus)
            write_record(file, record)
    if without:
        log(f"note: {len(without)} of {len(questions)} questions have no hard negative among their "
            f"hits (first: {shorten(without[0])})")


def write_positives(path, questions, results, corpus, marks, limits=NO_LIMITS, max_count=100,
                    log=print):
    """Write collate_pos's file: training records in DPR's form, made as DPR's were (sections 3.2
    and 4.2).

    The highest hit that contains an answer is the positive. The highest hits without an answer are
    the hard negatives, within the limits. Questions without a positive are dropped and counted in
    the log; earlier positives, negatives and teacher scores are replaced. marks: what
    measures.mark_answers returns.
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
            write_record(file, {"id": question.id, "question": question.text, **kept,
                                "positive_ctxs": [corpus_context(positive, corpus)],
                                "hard_negative_ctxs": [corpus_context(doc_index, corpus)
                                                       for doc_index in negatives[:max_count]]})
    num_unanswered = sum(not question.answers for question in questions)
    num_missed = len(questions) - num_positives - num_unanswered
    log(f"collate_pos: {path}")
    log(f"{num_positives} of {len(questions)} questions got a positive; dropped: {num_missed} "
        f"whose hits hold no answer, {num_unanswered} without answers")


def write_record(file, record):
    """Write a record as one line of JSON."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def list_hits(results, i, question, corpus, template):
    """Return [(document index or None, text)] of question i's documents or candidates, by rank."""
    indices, _ = results.row(i)
    if not isinstance(results, CandidateResults):
        return [(doc_index, corpus.text(doc_index)) for doc_index in indices]
    keys, doc_indices = list_candidates(question.record)
    if doc_indices is None:
        doc_indices = [None] * len(keys)
    texts = key_texts(question, [keys[position] for position in indices], template)
    return [(doc_indices[position], text) for position, text in zip(indices, texts)]


def put_hits(record, field, hits):
    """Set a record's neg or key, and their document indices if every hit has one."""
    record.pop(f"{field}_index", None)
    record[field] = [text for _, text in hits]
    if all(doc_index is not None for doc_index, _ in hits):
        record[f"{field}_index"] = [doc_index for doc_index, _ in hits]


def put_negatives(record, negatives, corpus):
    """Set a record's negatives in the record's own form: DPR's, Tevatron's or LLM-Embedder's."""
    record.pop("teacher_scores", None)  # they belonged to the old negatives
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
    """Return a hit in the form of DPR's files; a hit that is not a document has only a text."""
    if doc_index is None or not corpus:
        return {"title": "", "text": text}
    return corpus_context(doc_index, corpus)


def corpus_context(doc_index, corpus):
    """Return a document of the corpus in the form of DPR's files."""
    passage = corpus.passage(doc_index)
    return {"title": passage["title"], "text": passage["text"], "passage_id": passage["id"]}


# ---------------------------------------------------------------- choosing negatives

def keep_negatives(question, hits, scores, corpus, labels, template, limits, filter_answers,
                   is_regex):
    """Return the hits [(document index, text)] that are negatives within the limits.

    A positive is not a negative, nor is the question's own text, nor, with filter_answers, a text
    that contains an answer. As in LLM-Embedder, a text contains an answer if the answer is a
    substring, both in lower case; with is_regex, if the pattern matches. If several positives are
    among the hits, the lowest of their scores counts for the limits.
    """
    are_positives = find_positives(question, hits, corpus, labels, template)
    own_text = normalise(question.text)
    positive_score = min((score for score, is_positive in zip(scores, are_positives)
                          if is_positive), default=None)
    kept = []
    for i, (doc_index, text) in enumerate(hits):
        is_own = own_text and own_text in spell_document(doc_index, text, corpus)
        holds_answer = filter_answers and holds_string(text, question.answers, is_regex)
        is_negative = not (are_positives[i] or is_own or holds_answer)
        if is_negative and limits.allow(i + 1, scores[i], positive_score):
            kept.append((doc_index, text))
    return kept


def holds_string(text, answers, is_regex):
    """Return True if an answer is a substring of a text, in lower case, or its pattern matches."""
    if is_regex:
        return has_answer(text, answers, is_regex)
    return any(answer.lower() in text.lower() for answer in answers)


def find_positives(question, hits, corpus, labels, template):
    """Return, per hit (document index, text), True for a positive.

    A hit is a positive by its text, its label, its index (`pos_index`), or its id (under any
    accepted name). Copies of a positive in the corpus and the `passage` of a reader's record also
    count as positives.
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
    """Return a text in lower case with single blanks, so that equal texts compare equal."""
    return " ".join(text.split()).casefold()


def plain_text(key):
    """Return the text of a key without its title, "" for an object without a text."""
    if isinstance(key, str):
        return key
    text = find_value(key, TEXT_NAMES) if isinstance(key, dict) else None
    return text if isinstance(text, str) else ""


def spell_document(doc_index, text, corpus):
    """Return the set of a hit's normalised texts: formatted, without title, and with title."""
    spellings = {normalise(text)}
    if corpus and doc_index is not None:
        passage = corpus.passage(doc_index)
        spellings |= {normalise(passage["text"]),
                      normalise(f"{passage['title']} {passage['text']}")}
    return spellings
