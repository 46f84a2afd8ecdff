"""The ranked documents of every question: written as records or TREC runs, read back, fused."""
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
from records.reading import decode_line, holds_scores, iterate_json, read_lines, to_number
from utils import InputError, shorten

RUN_LINES = 2 ** 20  # lines of a run whose documents are looked up in the corpus at once
RRF_CONSTANT = 60    # the constant in reciprocal rank fusion (Cormack et al., SIGIR 2009)


class Results(NamedTuple):
    """Hold the documents of n questions by rank."""
    indices: np.ndarray  # (n, k), indices of documents in the corpus; -1 is padding
    scores: np.ndarray   # (n, k) float32

    def row(self, i):
        """Return ([document indices], [scores]) of question i, without the padding."""
        is_document = self.indices[i] >= 0
        return self.indices[i][is_document].tolist(), self.scores[i][is_document].tolist()


class CandidateResults(NamedTuple):
    """Hold the ranked candidates of n questions, which their records list.

    A candidate need not be a document of a corpus, so it is identified by its position in the
    record.
    """
    positions: np.ndarray  # (n, k), positions in mining.list_candidates; -1 as in Results
    scores: np.ndarray     # (n, k) float32

    def row(self, i):
        """Return ([positions], [scores]) of question i, without the padding."""
        is_candidate = self.positions[i] >= 0
        return self.positions[i][is_candidate].tolist(), self.scores[i][is_candidate].tolist()


def stack_rows(rows):
    """Return Results of [(question's index, document indices, scores)], in any order.

    Rows may have different lengths.
    """
    width = max(1, max(len(indices) for _, indices, _ in rows))
    results = Results(np.full((len(rows), width), -1), np.zeros((len(rows), width), np.float32))
    for i, indices, scores in rows:
        results.indices[i, :len(indices)] = indices
        results.scores[i, :len(indices)] = scores
    return results


def rank_scores(rows, hits):
    """Return Results of one {document index: score} per question, with at most `hits` documents.

    Documents with equal scores are ranked by index. Scores are compared as float32, as in
    trec_eval, because Results store float32.
    """
    ranked_rows = []
    for i, scores in enumerate(rows):
        doc_indices = np.fromiter(scores, np.int64, len(scores))
        values = np.fromiter(scores.values(), np.float64, len(scores)).astype(np.float32)
        order = np.lexsort((doc_indices, -values))[:hits]
        ranked_rows.append((i, doc_indices[order], values[order]))
    return stack_rows(ranked_rows)


# ---------------------------------------------------------------- the query's own document

def find_own(query_ids, corpus):
    """Return, per query, the index of the document that has the query's id, or -1.

    query_ids: texts, or None for a query without an id of its own.
    """
    found = corpus.indices([query_id or "" for query_id in query_ids])
    return [-1 if query_id is None else doc_index
            for query_id, doc_index in zip(query_ids, found)]


def note_own(count, total, log):
    """Log for how many of `total` queries --exclude_self removes the query's own document."""
    if count:
        log(f"--exclude_self: {count} of {total} queries have a document with their own id, which "
            "is left out")
    else:
        log(f"warning: --exclude_self leaves nothing out: none of {total} queries has a document "
            "with its own id")


def drop_own(results, own, hits):
    """Return the results, of the same type, without each query's own entry; at most `hits` each.

    own: per query, the document index or candidate position to remove; -1 removes nothing.
    """
    rows = []
    for i, own_index in enumerate(own):
        kept = [(index, score) for index, score in zip(*results.row(i)) if index != own_index]
        rows.append((i, [index for index, _ in kept[:hits]], [score for _, score in kept[:hits]]))
    return type(results)(*stack_rows(rows))


# ---------------------------------------------------------------- writing

def write_contexts(path, questions, results, corpus, marks):
    """Write a record with ranked ctxs for each question: a list if the path ends in .json, else
    one record per line.

    marks: what measures.mark_answers returns.
    """
    is_list = str(path).removesuffix(".gz").endswith(".json")
    with new_file(path) as file:
        for i, question in enumerate(questions):
            ctxs = read_contexts(results, i, corpus, marks[i])
            record = {"id": question.id, "question": question.text, **question.record, "ctxs": ctxs}
            if not has_keys(record):
                record.pop("teacher_scores", None)  # they belonged to the replaced ctxs
            line = json.dumps(record, ensure_ascii=False)
            if is_list:
                file.write("[\n" if i == 0 else ",\n")
                file.write(line)
            else:
                file.write(line + "\n")
        if is_list:
            file.write("\n]\n")


def read_contexts(results, i, corpus, marks):
    """Return the ctxs of question i: [{id, title, text, score}], and has_answer if there are marks.
    """
    ctxs = []
    for doc_index, score in zip(*results.row(i)):
        # 9 significant digits identify a float32, so that a file read back gives the same ranking
        ctxs.append(corpus.passage(doc_index) | {"score": float(f"{score:.9g}")})
    if marks is not None:
        for context, mark in zip(ctxs, marks):
            context["has_answer"] = mark
    return ctxs


def write_run(path, questions, results, corpus, name):
    """Write a TREC run: query, Q0, document, rank, score, name.

    No id may contain a blank; Corpus.refuse_blanks and check_question_ids check them beforehand.
    """
    with new_file(path) as file:
        for i, question in enumerate(questions):
            doc_indices, scores = results.row(i)
            ids = corpus.ids(doc_indices)
            for rank, (document_id, score) in enumerate(zip(ids, scores), 1):
                file.write(f"{question.id} Q0 {document_id} {rank} {score:.9g} {name}\n")


def write_results_page(path, title, remark, table, questions, results, corpus, labels, marks,
                       level=1, is_regex=False):
    """Write the page of retrieve.py --html. labels, marks and level are as in measure_queries."""
    def contexts(i):
        return read_contexts(results, i, corpus, marks[i])
    samples = [contexts(i) for i in range(min(DEPTH_SAMPLE, len(questions)))]
    inspected = (inspect_question(question, contexts(i), results.row(i)[0], labels[i], level)
                 for i, question in enumerate(questions))
    write_inspection(path, title, remark, table, inspected, len(questions),
                     depth=choose_depth(samples, len(questions)), is_regex=is_regex)


def inspect_question(question, contexts, doc_indices, labels, level):
    """Return the Inspected of a question, whose contexts get the labels of their documents."""
    for context, doc_index in zip(contexts, doc_indices):
        context.setdefault("has_answer", False)
        context["label"] = labels.get(doc_index)
        context["is_relevant"] = labels.get(doc_index, 0) >= level
    return Inspected(question.id, question.text, question.answers, contexts,
                     is_labelled=bool(relevant_documents(labels, level)))


# ---------------------------------------------------------------- reading back

class IdTable:
    """Stand in for a Corpus if only ids are needed. A new id gets the next index when it is first
    looked up.
    """
    has_ids = True

    def __init__(self):
        self.known_ids = []
        self.indices_by_id = {}

    def __len__(self):
        return len(self.known_ids)

    def require_ids(self, needed_by):
        """Do nothing, because an IdTable consists of ids."""

    def refuse_blanks(self, path):
        """Do nothing, because the ids of a run contain no blanks."""

    def indices(self, ids):
        """Return the indices of documents by their ids, and add new ids."""
        for document_id in ids:
            if document_id not in self.indices_by_id:
                self.indices_by_id[document_id] = len(self.known_ids)
                self.known_ids.append(document_id)
        return [self.indices_by_id[document_id] for document_id in ids]

    def ids(self, doc_indices):
        """Return the ids of documents by their indices."""
        return [self.known_ids[doc_index] for doc_index in doc_indices]


class RunLine(NamedTuple):
    """Hold one document of an earlier result."""
    query_id: str
    document_id: str
    score: float
    location: str


def read_run(path, questions, corpus, log=print, hits=None):
    """Return the Results of a TREC run, or of records with ctxs.

    Contexts without scores are ranked by their order. hits: documents kept per question; None: all.
    Raises InputError for a broken line, a document that is not in the corpus, or a result that has
    none of the questions.
    """
    scores = {question.id: {} for question in questions}  # {query id: {document index: score}}
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        lines = context_lines(path, {question.id: question.text for question in questions})
    else:
        lines = run_lines(path)
    others = 0     # lines of other questions
    repeated = []  # lines that name a document of their question again
    while chunk := list(itertools.islice(lines, RUN_LINES)):
        doc_indices = corpus.indices([line.document_id for line in chunk])
        for line, doc_index in zip(chunk, doc_indices):
            if doc_index < 0:
                raise InputError(f"{line.location}: document {shorten(line.document_id)} is not "
                                 "in the corpus; give the corpus that the result was made from")
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
                         f"{shorten(questions[0].id)}); give a result of these questions")
    if others:
        log(f"note: {others} documents in {path} belong to other questions")
    if repeated:
        log(f"note: {len(repeated)} lines of {path} name a document that their question already "
            f"has (first: {repeated[0].location}); a document's best score counts")
    return rank_scores([scores[question.id] for question in questions], hits)


def run_lines(path):
    """Yield the RunLines of a TREC run or of a run in MS MARCO's form (query, document, rank).

    MS MARCO's form has no scores, so the negative rank is used. Raises InputError.
    """
    has_ranks = None  # decided by the first line
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
                             "name), nor of MS MARCO's form (query document rank, the first rank "
                             "is 1)") from None


def read_rank(text):
    """Return the rank that a text spells. Raises ValueError for a rank below 1."""
    rank = int(text)
    if rank < 1:
        raise ValueError(f"{rank} is no rank")
    return rank


def context_lines(path, texts):
    """Yield the RunLines of records with ctxs. texts: {question id: text}. Raises InputError."""
    for index, (record, location) in enumerate(iterate_json(path)):
        if holds_scores(record):  # pytrec_eval's form of a run
            for query_id, scores in record.items():
                for document_id, score in scores.items():
                    yield RunLine(query_id, document_id, to_number(score), location)
            continue
        question = make_question(record, location, index)
        expected = texts.get(question.id, question.text)
        if expected and question.text != expected:  # "" for a saved run without texts
            raise InputError(f"{location}: question {shorten(question.id)} is "
                             f"{shorten(question.text)} here and {shorten(expected)} in the "
                             "questions; give a result of these questions")
        name = find_name(record, CONTEXT_NAMES) or "ctxs"
        lines = [context_line(context, rank, question.id, location)
                 for rank, context in enumerate(list_field(record, name, location))]
        yield from rank_unscored_last(lines)


def rank_unscored_last(lines):
    """Return RunLines in which lines without a score get scores below all others, in their order.

    test.py --scores writes no score for contexts that its reader has not read.
    """
    scores = [line.score for line in lines if line.score is not None]
    lowest = min(scores, default=1)
    step = max(1, abs(lowest))  # large enough to change a float32 of this size
    ranked, unscored = [], 0
    for line in lines:
        if line.score is None:
            unscored += 1
            line = line._replace(score=lowest - unscored * step)
        ranked.append(line)
    return ranked


def context_line(context, rank, query_id, location):
    """Return the RunLine of a record's context; a missing score is None. Raises InputError."""
    try:
        identifier = find_value(context, DOCUMENT_ID_NAMES)
        if type(identifier) not in (str, int):
            raise TypeError("no id")
        score = context.get("score")
        score = None if score is None else to_number(score)
        return RunLine(query_id, str(identifier), score, location)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{location}: ctxs[{rank}] must be an object with an id; its score, if it "
                         "has one, must be a number") from None


# ---------------------------------------------------------------- fusing

def fuse(results, how, weights, hits):
    """Return the weighted fusion of several Results.

    how: rrf sums weight / (60 + rank); weighted sums weight * score, with scores scaled to 0 .. 1.
    """
    rows = []
    for i in range(len(results[0].indices)):
        totals = defaultdict(float)
        for weight, result in zip(weights, results):
            doc_indices, scores = result.row(i)
            if how == "rrf":
                values = [1 / (RRF_CONSTANT + rank) for rank in range(1, len(scores) + 1)]
            else:
                values = scale_scores(scores)
            for doc_index, value in zip(doc_indices, values):
                totals[doc_index] += weight * value
        rows.append(totals)
    return rank_scores(rows, hits)


def scale_scores(scores):
    """Return scores shifted and scaled to 0 .. 1. If all are equal they become 1, because 0 means
    that a run did not find the document.
    """
    least = min(scores, default=0)
    spread = max(scores, default=0) - least
    return [(score - least) / spread if spread else 1.0 for score in scores]
