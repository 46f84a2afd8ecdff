"""Measures of results by labels of documents (as in trec_eval) or answers in passages (as in DPR).
"""
import json

from metrics import (
    compile_pattern,
    has_answer,
    ranking_metrics,
    relevant_documents,
    topk_accuracy,
    trec_order,
)
from records.files import new_file
from utils import InputError, progress_bar, shorten

# ---------------------------------------------------------------- answers

def mark_answers(questions, results, corpus, is_regex=False):
    """Return, per question, whether each passage contains an answer, by rank; None for a question
    without answers.
    """
    marks = []
    for i, question in enumerate(progress_bar(questions, desc="looking for answers")):
        if not question.answers:
            marks.append(None)
            continue
        doc_indices, _ = results.row(i)
        texts = [corpus.passage(doc_index)["text"] for doc_index in doc_indices]
        marks.append([has_answer(text, question.answers, is_regex) for text in texts])
    return marks


def note_patterns(answers, locations, log):
    """Log how many answers are malformed regular expressions, which match nothing, as in DPR.

    answers: a list per question; locations: FILE:LINE of each question.
    """
    malformed = [(pattern, location) for patterns, location in zip(answers, locations)
                 for pattern in patterns if compile_pattern(pattern) is None]
    if malformed:
        pattern, location = malformed[0]
        log(f"note: {len(malformed)} answers are malformed regular expressions and match nothing; "
            f"the first is {shorten(pattern)} ({location})")


# ---------------------------------------------------------------- labels

def read_labels(questions, qrels, corpus, log):
    """Return, per question, {document index: label} from the qrels.

    If qrels is None, the documents of the records' pos_index get the label 1. Documents that are
    not in the corpus: see index_labels. Raises InputError if the qrels judge none of the questions,
    or no document of the corpus.
    """
    if qrels is None:
        return [dict.fromkeys(question.pos_index or [], 1) for question in questions]
    rows = [qrels.get(question.id, {}) for question in questions]
    if questions and not any(rows):
        raise InputError("the qrels label no document for any of the questions (the first id is "
                         f"{shorten(next(iter(qrels), None))} in the qrels, "
                         f"{shorten(questions[0].id)} in the questions); give the qrels of these "
                         "questions")
    note_absent_queries(qrels, {question.id for question in questions}, log)
    return index_labels(rows, corpus, log)


def note_absent_queries(qrels, query_ids, log):
    """Log how many judged queries are not among the query ids."""
    absent = [query_id for query_id in qrels if query_id not in query_ids]
    if absent:
        log(f"note: {len(absent)} of {len(qrels)} judged queries are not among the queries (first: "
            f"{shorten(absent[0])}); the means are over the other {len(qrels) - len(absent)}")


def index_labels(rows, corpus, log):
    """Return rows of {document index: label} from rows of {document id: label}.

    A labelled document that is not in the corpus gets an index below -1, so that it counts as not
    found, as in trec_eval. Logs their number. Raises InputError if no labelled document is in the
    corpus.
    """
    # each id once, in order
    ids = list(dict.fromkeys(document_id for row in rows for document_id in row))
    doc_indices = dict(zip(ids, corpus.indices(ids)))
    absent = [document_id for document_id, doc_index in doc_indices.items() if doc_index < 0]
    if absent and len(absent) == len(ids):
        raise InputError(f"none of the qrels' documents (such as {shorten(absent[0])}) is in the "
                         "corpus; give the corpus of these qrels")
    if absent:
        log(f"note: {len(absent)} of {len(ids)} labelled documents are not in the corpus "
            f"(first: {shorten(absent[0])}); they count as not found")
    for i, document_id in enumerate(absent):
        doc_indices[document_id] = -2 - i
    return [{doc_indices[document_id]: label for document_id, label in row.items()} for row in rows]


# ---------------------------------------------------------------- measuring

def trec_ranking(doc_indices, scores, corpus):
    """Return one query's document indices in trec_eval's order: by descending score, then id.

    Every ranked list is put into this order before it is measured.
    """
    ids = doc_indices
    if len(set(scores)) < len(scores) and corpus:
        ids = corpus.ids(doc_indices)
    return [doc_indices[position] for position in trec_order(ids, scores)]


def measure_queries(questions, results, labels, marks, corpus, names, cutoffs, level=1):
    """Return, per question, {metric@k: value}; questions without labels (nq: answers) are left out
    of the metric.

    marks: what mark_answers returns; unused without the metric nq. level: see
    metrics.ranking_metrics.
    """
    ranking_names = [name for name in names if name != "nq"]
    rows = []
    for i, question in enumerate(questions):
        row = {}
        if labels[i]:
            ranking = trec_ranking(*results.row(i), corpus)
            row |= ranking_metrics(ranking, labels[i], ranking_names, cutoffs, level)
        if "nq" in names and question.answers:
            row |= topk_accuracy(marks[i], cutoffs)
        rows.append(row)
    return rows


def average_measures(rows, names, cutoffs, log):
    """Return ({metric@k: mean}, {metric: number of questions in the mean}).

    rows: what measure_queries returns. Logs if a mean leaves questions out.
    """
    means, counts = {}, {}
    for name in names:
        measured = [row for row in rows if f"{name}@{cutoffs[0]}" in row]
        counts[name] = len(measured)
        if len(measured) < len(rows):
            needed = "answers" if name == "nq" else "labels"
            log(f"note: {name} is the mean over the {len(measured)} of {len(rows)} questions "
                f"that have {needed}")
        for k in cutoffs:
            means[f"{name}@{k}"] = sum(row[f"{name}@{k}"] for row in measured) / len(measured)
    return means, counts


def note_unjudged(labels, level, log):
    """Log how many labelled queries have no relevant document, so that they count as 0."""
    labelled = [row for row in labels if row]
    without = sum(not relevant_documents(row, level) for row in labelled)
    if without:
        log(f"note: {without} of {len(labelled)} labelled queries have no document with a label of "
            f"{level:g} or more (--relevance_level); they count as 0, as in trec_eval")


def write_measures_per_query(path, questions, rows):
    """Write each question's measures: one JSON object per line if the path ends in .jsonl, else a
    table of query, measure and value, separated by tabs.
    """
    is_json = str(path).removesuffix(".gz").endswith(".jsonl")
    with new_file(path) as file:
        if not is_json:
            file.write("query\tmeasure\tvalue\n")
        for question, row in zip(questions, rows):
            if is_json:
                file.write(json.dumps({"query": question.id} | row, ensure_ascii=False) + "\n")
            else:
                for name, value in row.items():
                    file.write(f"{question.id}\t{name}\t{value:.9g}\n")
