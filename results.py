"""What a retrieval is written as: reader records, TREC runs, LLM-Embedder's collated files, measures."""
import ast
import csv
import json
import os
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from corpus import read_lines
from data import read_json
from metrics import has_answer, ranking_metrics, topk_accuracy
from utils import InputError, new_file

COLLATED = ("collate_neg", "collate_key", "collate_score")


class Query(NamedTuple):
    """A question: its record as it was read, identifier, text, task, gold answers."""
    record: dict
    id: str
    text: str
    task: str
    answers: list


def read_questions(path):
    """Queries of records (.json, .jsonl), DPR's nq-test.csv (question <tab> list of answers), or id <tab> text. Raises InputError."""
    name = str(path).removesuffix(".gz")
    if not name.endswith((".csv", ".tsv")):
        return [make_query(record, number, place) for number, (record, place) in enumerate(read_json(path))]
    queries = []
    for number, line in enumerate(read_lines(path), 1):
        cells = next(csv.reader([line.decode("utf-8", "replace").rstrip("\r\n")], delimiter="\t"), [])
        if not cells:
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
        queries.append(make_query(record, len(queries), f"{path}:{number}"))
    return queries


def make_query(record, number, place):
    """The Query of a record; its position is its id where it has none. Raises InputError."""
    text = record.get("question", record.get("query", record.get("text"))) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: a query without text; 'question' or 'query' is wanted")
    id = next((record[key] for key in ("id", "_id", "query_id", "qid") if key in record), number)
    return Query(record, str(id), text, record.get("task", ""), record.get("answers") or [])


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
    as_list = str(path).endswith(".json")
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
            file.writelines(f"{query.id} Q0 {id} {rank} {score:.6f} {name}\n"
                            for rank, (id, score) in enumerate(zip(corpus.ids(numbers), scores), 1))


def read_run(path, queries, corpus, hits):
    """Results of a TREC run or of a file of records with ctxs, for these queries. Raises InputError."""
    found = {query.id: {} for query in queries}
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        rows = ((make_query(record, n, place).id, context.get("id"), context.get("score", 0), place)
                for n, (record, place) in enumerate(read_json(path)) for context in record.get("ctxs") or [])
    else:
        rows = (split_run_line(line, f"{path}:{number}") for number, line in enumerate(read_lines(path), 1) if line.strip())
    rows = list(rows)
    for (query, document, score, place), number in zip(rows, corpus.numbers([str(row[1]) for row in rows])):
        if number < 0:
            raise InputError(f"{place}: document {document!r} is not in the corpus; is it a result of another one?")
        if query in found:
            found[query][number] = float(score)
    return from_dictionaries([found[query.id] for query in queries], hits)


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


def collate(kind, path, queries, results, texts, max_neg_num=100, filter_answers=False):
    """Writes LLM-Embedder's files: negatives mined from the hits, hits as keys, or scores as teacher_scores.

    collate_neg leaves out texts equal to a positive and, with filter_answers, those that hold an answer (a substring, lower case); it
    drops old teacher_scores and queries without hits. texts(i, numbers) are the keys' texts.
    """
    with new_file(path) as file:
        for i, query in enumerate(queries):
            record, (numbers, scores) = dict(query.record), results.row(i)
            if kind == "collate_score":
                by_number = dict(zip(numbers, scores))
                record["teacher_scores"] = [by_number[number] for number in candidates(record)[0]]
            else:
                keys = list(zip(numbers, texts(i, numbers)))
                if kind == "collate_neg":
                    if not numbers:
                        continue
                    held = [answer.lower() for answer in query.answers] if filter_answers else []
                    pos = set(record.get("pos") or [])
                    gold = set(record.get("pos_index") or [])
                    keys = [(n, text) for n, text in keys if n not in gold and text not in pos and not any(a in text.lower() for a in held)]
                    keys = keys[:max_neg_num]
                    record.pop("teacher_scores", None)
                field = "neg" if kind == "collate_neg" else "key"
                record |= {field: [text for _, text in keys], field + "_index": [number for number, _ in keys]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def candidates(record):
    """(numbers, keys) of a record's candidates, its key or its pos and neg; numbers are given with them or are their positions."""
    if "key" in record:
        return record.get("key_index") or list(range(len(record["key"]))), record["key"]
    keys = list(record.get("pos") or []) + list(record.get("neg") or [])
    given = list(record.get("pos_index") or []) + list(record.get("neg_index") or [])
    return given if len(given) == len(keys) else list(range(len(keys))), keys


def collated_path(path, field, name):
    """LLM-Embedder's name of a collated file: records.json becomes records.FIELD.NAME.json."""
    stem, ending = os.path.splitext(str(path).removesuffix(".gz"))
    return ".".join([stem, field, *([name] if name else [])]) + ending


def measure(queries, results, corpus, qrels, marks, names, cutoffs):
    """{metric@k: mean over the queries that have a label (nq: an answer)}; labels are qrels or the records' pos_index."""
    rows = []
    for i, query in enumerate(queries):
        labels, row = {number: 1 for number in query.record.get("pos_index") or []}, {}
        if qrels is not None:
            own = qrels.get(query.id, {})
            labels = {number: label for number, label in zip(corpus.numbers(list(own)), own.values()) if number >= 0}
        if labels:
            row |= ranking_metrics(results.row(i)[0], labels, [name for name in names if name != "nq"], cutoffs)
        if "nq" in names and query.answers:
            row |= topk_accuracy(marks[i], cutoffs)
        rows.append(row)
    wanted = [f"{name}@{k}" for name in names for k in cutoffs]
    counts = {name: sum(name in row for row in rows) for name in wanted}
    if not all(counts.values()):
        lacking = next(name for name in wanted if not counts[name])
        wanted = "'answers'" if lacking.startswith("nq") else "qrels or 'pos_index'"
        raise InputError(f"{lacking} cannot be measured: no query has {wanted}")
    return {name: sum(row.get(name, 0) for row in rows) / counts[name] for name in wanted}
