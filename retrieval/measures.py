"""Measures of results: by labels of documents (as trec_eval), by answers in passages (as DPR)."""
from metrics import has_answer, ranking_metrics, topk_accuracy, trec_order
from utils import InputError, progress_bar, shorten


def mark_answers(questions, results, corpus):
    """Per question, [does the passage hold an answer] by rank; None where there are no answers."""
    marks = []
    for i, question in enumerate(progress_bar(questions, desc="looking for answers")):
        if not question.answers:
            marks.append(None)
            continue
        doc_indices, _ = results.row(i)
        texts = [corpus.passage(doc_index)["text"] for doc_index in doc_indices]
        marks.append([has_answer(text, question.answers) for text in texts])
    return marks


def read_labels(questions, qrels, corpus, log):
    """[{document index: label}], one per question, of the qrels, or of the records' pos_index.

    The latter, with the label 1, if qrels is None. Each labelled document that the corpus does not
    have gets an index below -1, so that it counts as not found, as in trec_eval. Raises InputError
    if the qrels are of other questions or of another corpus.
    """
    if qrels is None:
        return [dict.fromkeys(question.record.get("pos_index") or [], 1) for question in questions]
    rows = [qrels.get(question.id, {}) for question in questions]
    # each document once, in order
    ids = list(dict.fromkeys(document_id for row in rows for document_id in row))
    if questions and not ids:
        raise InputError("the qrels label no document for any of the questions (theirs are such as "
                         f"{shorten(next(iter(qrels), None))}, the questions' ids such as "
                         f"{shorten(questions[0].id)}); give the qrels of these questions")
    doc_indices = dict(zip(ids, corpus.indices(ids)))
    absent = [document_id for document_id, doc_index in doc_indices.items() if doc_index < 0]
    if absent and len(absent) == len(ids):
        raise InputError(f"none of the qrels' documents (such as {shorten(absent[0])}) is in the "
                         "corpus; give the corpus that they are of")
    if absent:
        log(f"note: {len(absent)} of {len(ids)} labelled documents are not in the corpus, "
            f"{shorten(absent[0])} the first; they count as not found")
    for i, document_id in enumerate(absent):
        doc_indices[document_id] = -2 - i
    return [{doc_indices[document_id]: label for document_id, label in row.items()} for row in rows]


def trec_ranking(results, i, corpus):
    """The document indices of one question's results as trec_eval ranks the run: documents with
    equal scores by falling id, and not in the order in which they were found.
    """
    doc_indices, scores = results.row(i)
    if len(set(scores)) == len(scores):
        return doc_indices
    ids = corpus.ids(doc_indices) if corpus else doc_indices
    return [doc_indices[position] for position in trec_order(ids, scores)]


def measure(questions, results, labels, marks, corpus, names, cutoffs, log):
    """{metric@k: mean over the questions that have a label (nq: an answer)}.

    marks: what mark_answers returns; it may be None where names does not hold nq.
    """
    ranking_names = [name for name in names if name != "nq"]
    rows = []
    for i, question in enumerate(questions):
        row = {}
        if labels[i]:
            row |= ranking_metrics(trec_ranking(results, i, corpus), labels[i], ranking_names,
                                   cutoffs)
        if "nq" in names and question.answers:
            row |= topk_accuracy(marks[i], cutoffs)
        rows.append(row)
    means = {}
    for name in names:
        measured = [row for row in rows if f"{name}@{cutoffs[0]}" in row]
        if len(measured) < len(questions):
            needed = "answers" if name == "nq" else "labels"
            log(f"note: {name} is the mean over the {len(measured)} of {len(questions)} questions "
                f"that have {needed}")
        for k in cutoffs:
            means[f"{name}@{k}"] = sum(row[f"{name}@{k}"] for row in measured) / len(measured)
    return means
