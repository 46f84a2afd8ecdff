"""Results: each question's documents by rank; written as records or TREC runs, read back, fused."""
import itertools
import json
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from metrics import relevant_documents
from pages.page import DEPTH_SAMPLE, Inspected, choose_depth, write_inspection
from records.fields import has_keys, list_field
from records.files import new_file
from records.names import CONTEXT_NAMES, DOCUMENT_ID_NAMES, find_name, find_value
from records.questions import make_question
from records.reader_records import note_rising, rank_order
from records.reading import decode_line, holds_scores, read_json, read_lines, to_number
from utils import InputError, shorten

READ = 2 ** 20      # lines of a run whose documents are looked up in the corpus at once
RRF_CONSTANT = 60   # of reciprocal rank fusion (Cormack et al., SIGIR 2009)


class Results(NamedTuple):
    """The documents of n questions by rank: their indices (n, k), -1 where there are fewer, and
    scores (n, k).
    """
    indices: np.ndarray
    scores: np.ndarray

    def row(self, i):
        """([document indices], [scores]) of one question, without the padding."""
        is_document = self.indices[i] >= 0
        return self.indices[i][is_document].tolist(), self.scores[i][is_document].tolist()


def stack(rows):
    """Results of [(question's index, document indices, scores)], of any lengths, in any order."""
    width = max(1, max(len(indices) for _, indices, _ in rows))
    results = Results(np.full((len(rows), width), -1), np.zeros((len(rows), width), np.float32))
    for i, indices, scores in rows:
        results.indices[i, :len(indices)] = indices
        results.scores[i, :len(indices)] = scores
    return results


def from_dictionaries(rows, hits):
    """Return the Results of one {document index: score} per question; equal scores by index.

    Scores are compared as float32, which Results hold and trec_eval compares.
    """
    ranked_rows = []
    for i, scores in enumerate(rows):
        doc_indices = np.fromiter(scores, np.int64, len(scores))
        values = np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32)
        order = np.lexsort((doc_indices, -values))[:hits]
        ranked_rows.append((i, doc_indices[order], values[order]))
    return stack(ranked_rows)


def round_score(score):
    """Return a float32's value as the decimal of 9 significant digits, which still identifies it.

    Files hold scores with these digits, so that a ranking read back is the same one.
    """
    return float(f"{score:.9g}")


# ---------------------------------------------------------------- the query's own document

def find_own(query_ids, corpus):
    """Return the index of the document whose id is the query's, per query; -1 where there is none.

    query_ids: texts, or None for a query without an id of its own.
    """
    found = corpus.indices([query_id or "" for query_id in query_ids])
    return [-1 if query_id is None else doc_index
            for query_id, doc_index in zip(query_ids, found)]


def note_own(count, total, log):
    """Log that --exclude_self leaves the own document out for `count` of `total` queries."""
    if count:
        log(f"--exclude_self: {count} of {total} queries have a document with their own id, which "
            "is left out")
    else:
        log(f"warning: --exclude_self leaves nothing out: none of {total} queries has a document "
            "with its own id")


def drop_own(results, own, hits):
    """Return Results without each query's own document (an index, or -1), of `hits` at most."""
    rows = []
    for i, own_index in enumerate(own):
        doc_indices, scores = results.row(i)
        kept = [(doc_index, score) for doc_index, score in zip(doc_indices, scores)
                if doc_index != own_index][:hits]
        rows.append((i, [doc_index for doc_index, _ in kept], [score for _, score in kept]))
    return stack(rows)


# ---------------------------------------------------------------- writing

def write_contexts(path, questions, results, corpus, marks):
    """Write reader records, each with its ctxs by rank: a list for .json, else one per line.

    marks: per question, has_answer of each document by rank, or None (measures.mark_answers).
    """
    is_list = str(path).removesuffix(".gz").endswith(".json")
    with new_file(path) as file:
        for i, question in enumerate(questions):
            ctxs = read_contexts(results, i, corpus, marks[i])
            record = {"id": question.id, "question": question.text, **question.record, "ctxs": ctxs}
            if not has_keys(record):
                record.pop("teacher_scores", None)  # they were of earlier ctxs
            line = json.dumps(record, ensure_ascii=False)
            if is_list:
                file.write("[\n" if i == 0 else ",\n")
                file.write(line)
            else:
                file.write(line + "\n")
        if is_list:
            file.write("\n]\n")


def read_contexts(results, i, corpus, marks):
    """Return the ctxs of one question: [{id, title, text, score, has_answer if there are marks}].
    """
    ctxs = []
    for doc_index, score in zip(*results.row(i)):
        ctxs.append(corpus.passage(doc_index) | {"score": round_score(score)})
    if marks is not None:
        for context, mark in zip(ctxs, marks):
            context["has_answer"] = mark
    return ctxs


def write_run(path, questions, results, corpus, name):
    """Write a TREC run: query, Q0, document, rank, score, name.

    Corpus.refuse_blanks has made sure that no document's id holds a blank.
    """
    with new_file(path) as file:
        for i, question in enumerate(questions):
            doc_indices, scores = results.row(i)
            ids = corpus.ids(doc_indices)
            for rank, (document_id, score) in enumerate(zip(ids, scores), 1):
                file.write(f"{question.id} Q0 {document_id} {rank} {score:.9g} {name}\n")


def write_page(path, title, remark, table, questions, results, corpus, labels, marks, level=1,
               is_regex=False):
    """Write the page of retrieve.py --html; labels, marks and level are measure_queries's."""
    def contexts(i):
        return read_contexts(results, i, corpus, marks[i])
    samples = [contexts(i) for i in range(min(DEPTH_SAMPLE, len(questions)))]
    inspected = (inspect(question, contexts(i), results.row(i)[0], labels[i], level)
                 for i, question in enumerate(questions))
    write_inspection(path, title, remark, table, inspected, len(questions),
                     depth=choose_depth(samples, len(questions)), is_regex=is_regex)


def inspect(question, contexts, doc_indices, labels, level):
    """Return the Inspected of a question: its contexts with the labels of their documents."""
    for context, doc_index in zip(contexts, doc_indices):
        context.setdefault("has_answer", False)
        context["label"] = labels.get(doc_index)
        context["is_relevant"] = labels.get(doc_index, 0) >= level
    return Inspected(question.id, question.text, question.answers, contexts,
                     is_labelled=bool(relevant_documents(labels, level)))


# ---------------------------------------------------------------- reading back

class IdTable:
    """Stands in for a Corpus of which only ids are known: a document's index is the place of its id
    among those that were asked for.
    """
    has_ids = True

    def __init__(self):
        self.known_ids = []
        self.indices_by_id = {}

    def __len__(self):
        return len(self.known_ids)

    def require_ids(self, needed_by):
        """Do nothing: ids are all there is."""

    def refuse_blanks(self, path):
        """Do nothing: a run's ids have no blanks."""

    def indices(self, ids):
        """Return the indices of documents by their ids, adding the new ones."""
        for document_id in ids:
            if document_id not in self.indices_by_id:
                self.indices_by_id[document_id] = len(self.known_ids)
                self.known_ids.append(document_id)
        return [self.indices_by_id[document_id] for document_id in ids]

    def ids(self, doc_indices):
        """Return the ids of documents by their indices."""
        return [self.known_ids[doc_index] for doc_index in doc_indices]


class RunLine(NamedTuple):
    """One hit of an earlier result."""
    query_id: str
    document_id: str
    score: float
    location: str


def read_run(path, questions, corpus, log=print, hits=None):
    """Return the Results of a TREC run, or of records with ctxs, whose order stands in for missing
    scores; of each question the `hits` best, all if None.

    Raises InputError for a broken line, a document that the corpus does not have, or a result of
    other questions.
    """
    scores = {question.id: {} for question in questions}  # {query id: {document index: score}}
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        lines = context_lines(path, {question.id: question.text for question in questions})
    else:
        lines = run_lines(path)
    others = 0  # lines of other questions
    repeated = []  # lines of a document that the question already has
    while chunk := list(itertools.islice(lines, READ)):
        doc_indices = corpus.indices([line.document_id for line in chunk])
        for line, doc_index in zip(chunk, doc_indices):
            if doc_index < 0:
                raise InputError(f"{line.location}: document {shorten(line.document_id)} is not "
                                 "in the corpus; is it a result of another one?")
            if line.query_id not in scores:
                others += 1
            elif doc_index in scores[line.query_id]:
                repeated.append(line)
                scores[line.query_id][doc_index] = max(scores[line.query_id][doc_index], line.score)
            else:
                scores[line.query_id][doc_index] = line.score
    note_rising([rank_order(list(row.values())) for row in scores.values()], path, log)
    shared = len([row for row in scores.values() if row])
    if shared < len(questions):
        log(f"note: {path} has documents for {shared} of the {len(questions)} questions")
    if not shared:
        raise InputError(f"{path}: holds no document for any of the questions (the first is "
                         f"{shorten(questions[0].id)}); is it of others?")
    if others:
        log(f"note: {others} documents in {path} belong to other questions")
    if repeated:
        log(f"note: {len(repeated)} lines of {path} name a document that their question already "
            f"has (first: {repeated[0].location}); a document's best score counts")
    return from_dictionaries([scores[question.id] for question in questions], hits)


def run_lines(path):
    """Yield the RunLines of a TREC run, or of MS MARCO's (query, document, rank), whose ranks
    stand in for scores.

    Raises InputError.
    """
    has_ranks = None  # the first line decides
    for line_number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        location = f"{path}:{line_number}"
        cells = decode_line(line, path, line_number).split()
        if has_ranks is None:
            has_ranks = len(cells) == 3
        try:
            if has_ranks:
                query_id, document_id, rank = cells
                yield RunLine(query_id, document_id, -read_rank(rank), location)
            else:
                yield RunLine(cells[0], cells[2], to_number(cells[4]), location)
        except (IndexError, ValueError):
            raise InputError(f"{location}: not a line of a TREC run (query Q0 document rank score "
                             "name), nor of MS MARCO's (query document rank, from 1 on)") from None


def read_rank(text):
    """Return the rank, 1 or more, that a text spells. Raises ValueError."""
    rank = int(text)
    if rank < 1:
        raise ValueError(f"{rank} is no rank")
    return rank


def context_lines(path, texts):
    """Yield the RunLines of records with ctxs; texts: the questions' by id. Raises InputError."""
    for index, (record, location) in enumerate(read_json(path)):
        if holds_scores(record):  # pytrec_eval's form of a run
            for query_id, scores in record.items():
                for document_id, score in scores.items():
                    yield RunLine(query_id, document_id, to_number(score), location)
            continue
        question = make_question(record, location, index)
        expected = texts.get(question.id, question.text)
        if expected and question.text != expected:  # a saved run is measured without the texts
            raise InputError(f"{location}: question {shorten(question.id)} is "
                             f"{shorten(question.text)} here and {shorten(expected)} in the "
                             "questions; give theirs")
        name = find_name(record, CONTEXT_NAMES) or "ctxs"
        lines = [context_line(context, rank, question.id, location)
                 for rank, context in enumerate(list_field(record, name, location))]
        yield from rank_unscored_last(lines)


def rank_unscored_last(lines):
    """Return RunLines of which those without a score come last, in their order.

    test.py --scores leaves contexts that its reader has not read without a score.
    """
    scores = [line.score for line in lines if line.score is not None]
    lowest = min(scores, default=1)
    step = max(1, abs(lowest))  # one that a float32 of this size can hold
    ranked, unscored = [], 0
    for line in lines:
        if line.score is None:
            unscored += 1
            line = line._replace(score=lowest - unscored * step)
        ranked.append(line)
    return ranked


def context_line(context, rank, query_id, location):
    """Return the RunLine of a record's context; its score is None if it has none. Raise InputError.
    """
    try:
        identifier = find_value(context, DOCUMENT_ID_NAMES)
        if type(identifier) not in (str, int):
            raise TypeError("no id")
        score = context.get("score")
        score = None if score is None else to_number(score)
        return RunLine(query_id, str(identifier), score, location)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{location}: ctxs[{rank}] is no object with an id and, if any, a score "
                         "that is a number") from None


# ---------------------------------------------------------------- fusing

def fuse(results, how, weights, hits):
    """One Results of several.

    rrf sums weight / (60 + rank), weighted sums weight * score, the scores scaled to 0 .. 1.
    """
    rows = []
    for i in range(len(results[0].indices)):
        totals = defaultdict(float)
        for weight, result in zip(weights, results):
            doc_indices, scores = result.row(i)
            values = reciprocal_ranks(scores) if how == "rrf" else scale_scores(scores)
            for doc_index, value in zip(doc_indices, values):
                totals[doc_index] += weight * value
        rows.append(totals)
    return from_dictionaries(rows, hits)


def reciprocal_ranks(scores):
    """1 / (60 + rank) of ranked scores."""
    return [1 / (RRF_CONSTANT + rank) for rank in range(1, len(scores) + 1)]


def scale_scores(scores):
    """Return scores moved and scaled to 0 .. 1; equal ones, and one that is alone, become 1.

    A document that a run has found must not count as one that it has not.
    """
    least = min(scores, default=0)
    spread = max(scores, default=0) - least
    return [(score - least) / spread if spread else 1.0 for score in scores]
