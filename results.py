"""Questions, and what a retrieval of them is written as: reader records, TREC runs, measures; and read back from."""
import ast
import itertools
import json
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from corpus import is_header, read_lines, split_cells
from data import check_types, gold_answers, read_json
from metrics import has_answer, ranking_metrics, topk_accuracy
from utils import InputError, new_file


class Query(NamedTuple):
    """A question: its record as it was read, identifier, text, task, gold answers."""
    record: dict
    id: str
    text: str
    task: str
    answers: list


def read_questions(path, task=""):
    """Queries of records (.json, .jsonl), DPR's nq-test.csv (question <tab> list of answers), or id <tab> text. Raises InputError."""
    name = str(path).removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        return [make_query(record, number, place, task) for number, (record, place) in enumerate(read_json(path))]
    queries = []
    for number, line in enumerate(read_lines(path), 1):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        cells = split_cells(text)
        if not cells or number == 1 and is_header(text):
            continue
        if len(cells) != 2:
            raise InputError(f"{path}:{number}: {len(cells)} columns, two are wanted: question and answers, or id and text")
        if cells[1].startswith("["):
            try:
                answers = [str(answer) for answer in ast.literal_eval(cells[1])]
            except (SyntaxError, ValueError):
                raise InputError(f"{path}:{number}: {cells[1][:60]!r} is not a list of answers") from None
            record = {"id": str(len(queries)), "question": cells[0], "answers": answers}
        else:
            record = {"id": cells[0], "question": cells[1]}
        queries.append(make_query(record, len(queries), f"{path}:{number}", task))
    return queries


def make_query(record, number, place, task=""):
    """The Query of a record; its position is its id where it has none, `task` its task. Raises InputError."""
    text = record.get("question", record.get("query", record.get("text"))) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: a query without text; 'question' or 'query' is wanted")
    check_types(record, place)
    id = next((record[key] for key in ("id", "_id", "query_id", "qid") if record.get(key) is not None), number)
    return Query(record, str(id), text, record.get("task") or task, gold_answers(record, place)[0])


class Results(NamedTuple):
    """Found documents by rank: their numbers (n, k), -1 where there are fewer, and scores (n, k)."""
    numbers: np.ndarray
    scores: np.ndarray

    def row(self, i):
        """([numbers], [scores]) of one query, without the padding."""
        keep = self.numbers[i] >= 0
        return self.numbers[i][keep].tolist(), self.scores[i][keep].tolist()


def mark_answers(queries, results, corpus):
    """[[does each found passage hold an answer]] by rank, None for a query without gold answers."""
    return [[has_answer(corpus.passage(number)["text"], query.answers) for number in results.row(i)[0]] if query.answers else None
            for i, query in enumerate(tqdm(queries, desc="looking for answers", leave=False, disable=None))]


def write_contexts(path, queries, results, corpus, marks):
    """Reader records: each record with ctxs in rank order, {id, title, text, score, has_answer}; .json a list, else JSON lines."""
    as_list = str(path).removesuffix(".gz").endswith(".json")
    with new_file(path) as file:
        for i, query in enumerate(queries):
            ctxs = [corpus.passage(number) | {"score": round(score, 6)} for number, score in zip(*results.row(i))]
            for context, mark in zip(ctxs, marks[i] or ()):
                context["has_answer"] = mark
            record = {"id": query.id, "question": query.text, **query.record, "ctxs": ctxs}
            file.write(("[\n" if i == 0 else ",\n") * as_list + json.dumps(record, ensure_ascii=False) + "\n" * (not as_list))
        file.write("\n]\n" * as_list)


def write_run(path, queries, results, corpus, name):
    """A TREC run: query, Q0, document, rank, score, name."""
    with new_file(path) as file:
        for i, query in enumerate(queries):
            numbers, scores = results.row(i)
            ids = corpus.ids(numbers)
            if len(" ".join(ids).split()) != len(ids):
                raise InputError(f"{path}: a TREC run cannot hold the blanks in ids of question {query.id!r}'s documents; use --output")
            rows = enumerate(zip(ids, scores), 1)
            file.write("".join([f"{query.id} Q0 {id} {rank} {score:.6f} {name}\n" for rank, (id, score) in rows]))


def read_run(path, queries, corpus, say=print):
    """Results of a TREC run or of a file of records with ctxs, in their order where they have no scores. Raises InputError."""
    found, texts = {query.id: {} for query in queries}, {query.id: query.text for query in queries}
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        rows = (row for number, (record, place) in enumerate(read_json(path)) for row in context_rows(record, number, place, texts))
    else:
        rows = (split_run_line(line, f"{path}:{number}") for number, line in enumerate(read_lines(path), 1) if line.strip())
    while chunk := list(itertools.islice(rows, 2 ** 20)):
        for (query, document, score, place), number in zip(chunk, corpus.numbers([row[1] for row in chunk])):
            if number < 0:
                raise InputError(f"{place}: document {document!r} is not in the corpus; is it a result of another one?")
            if query in found:
                found[query][number] = score
    shared = sum(map(bool, found.values()))
    if shared < len(queries):
        say(f"note: {path} has documents for {shared} of the {len(queries)} questions")
    if not shared:
        raise InputError(f"{path}: holds no document for any of the questions (the first is {queries[0].id!r}); is it of others?")
    return from_dictionaries([found[query.id] for query in queries], corpus.size)


def context_rows(record, number, place, texts):
    """(query, document, score, place) of a record's ctxs; texts are the questions' by id. Raises InputError."""
    _, query, text, *_ = make_query(record, number, place)
    if texts.get(query, text) != text:
        raise InputError(f"{place}: question {query!r} is {text[:60]!r} here and {texts[query][:60]!r} in the questions; give theirs")
    for rank, context in enumerate(record.get("ctxs") or []):
        try:
            score = context.get("score")
            yield query, str(context["id"]), float(-rank if score is None else score), place
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{place}: ctxs[{rank}] is no object with an id and, if any, a score that is a number") from None


def split_run_line(line, place):
    """(query, document, score, place) of a line of a TREC run. Raises InputError."""
    cells = line.decode("utf-8", "replace").split()
    try:
        return cells[0], cells[2], float(cells[4]), place
    except (IndexError, ValueError):
        raise InputError(f"{place}: not a line of a TREC run (query Q0 document rank score name)") from None


def from_dictionaries(rows, hits):
    """Results of one {number: score} per query, by falling score, equal ones by number."""
    best = [sorted(row, key=lambda number: (-row[number], number))[:hits] for row in rows]
    return stack([(i, own, [rows[i][number] for number in own]) for i, own in enumerate(best)])


def stack(rows):
    """Results of [(query's place, numbers, scores)] of unequal lengths."""
    width = max(1, max(len(numbers) for _, numbers, _ in rows))
    result = Results(np.full((len(rows), width), -1), np.zeros((len(rows), width), np.float32))
    for i, numbers, scores in rows:
        result.numbers[i, :len(numbers)], result.scores[i, :len(numbers)] = numbers, scores
    return result


def fuse(results, how, weights, hits, constant=60):
    """One result of several: rrf (sum of weight / (60 + rank), SIGIR 2009) or weighted (sum of weight * score scaled to 0 .. 1)."""
    rows = []
    for i in range(len(results[0].numbers)):
        total = {}
        for weight, result in zip(weights, results):
            numbers, scores = result.row(i)
            least, spread = min(scores, default=0), max(scores, default=1) - min(scores, default=0) or 1
            for rank, (number, score) in enumerate(zip(numbers, scores), 1):
                value = 1 / (constant + rank) if how == "rrf" else (score - least) / spread
                total[number] = total.get(number, 0) + weight * value
        rows.append(total)
    return from_dictionaries(rows, hits)


# ---------------------------------------------------------------------------------------------------- measures

def read_labels(queries, qrels, corpus, say):
    """[{document's number: label}], one per query, of the qrels or else the records' pos_index (1).

    A labelled document that the corpus does not have gets a number of its own below -1, so that it counts as not found, as in trec_eval.
    Raises InputError.
    """
    if qrels is None:
        return [dict.fromkeys(query.record.get("pos_index") or [], 1) for query in queries]
    own = [qrels.get(query.id, {}) for query in queries]
    documents = list(dict.fromkeys(document for row in own for document in row))
    if queries and not documents:
        raise InputError(f"the qrels label no document for any of the questions (theirs are such as {next(iter(qrels), None)!r}, the "
                         f"questions' ids such as {queries[0].id!r}); give the qrels of these questions")
    numbers = dict(zip(documents, corpus.numbers(documents)))
    absent = [document for document, number in numbers.items() if number < 0]
    if absent:
        if len(absent) == len(documents):
            raise InputError(f"none of the qrels' documents (such as {absent[0]!r}) is in the corpus; give the corpus that they are of")
        say(f"note: {len(absent)} of {len(documents)} labelled documents are not in the corpus, {absent[0]!r} the first; they count as "
            "not found")
    numbers |= {document: -2 - i for i, document in enumerate(absent)}
    return [{numbers[document]: label for document, label in row.items()} for row in own]


def measure(queries, results, labels, marks, names, cutoffs):
    """{metric@k: mean over the queries that have a label (nq: an answer)}."""
    rows = []
    for i, query in enumerate(queries):
        row = ranking_metrics(results.row(i)[0], labels[i], [name for name in names if name != "nq"], cutoffs) if labels[i] else {}
        if "nq" in names and query.answers:
            row |= topk_accuracy(marks[i], cutoffs)
        rows.append(row)
    for name in names:
        counted = sum(f"{name}@{cutoffs[0]}" in row for row in rows)
        if counted < len(queries):
            has = "answers" if name == "nq" else "labels"
            print(f"note: {name} is the mean over the {counted} of {len(queries)} questions that have {has}")
    wanted = [f"{name}@{k}" for name in names for k in cutoffs]
    return {name: sum(row.get(name, 0) for row in rows) / sum(name in row for row in rows) for name in wanted}
