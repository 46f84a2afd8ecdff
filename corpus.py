"""Corpora, queries and relevance judgments, of all the field's formats, gzipped or not."""
import csv
import json
import math
import os
import random
from collections import defaultdict

import numpy as np

from data import open_text, parse_json, read_json
from utils import InputError


class Corpus:
    """Documents by number or id; only ids and line offsets are held in memory, except for gzipped files and lists.

    Files: psgs_w100.tsv (id, text, title, with a header), BEIR's corpus.jsonl (_id, title, text), or JSON lines with any
    columns, whose ids are their numbers if no column is named id, _id, docid, doc_id or passage_id.
    """

    def __init__(self, paths, template):
        self.template, self.ids, self.parts = template, [], []  # parts: (path, header or None, offsets, first number)
        for path in [paths] if isinstance(paths, str) else paths:
            self.add_file(path)
        self.number = {id: i for i, id in enumerate(self.ids)}
        if len(self.number) < len(self.ids):
            twice = next(id for i, id in enumerate(self.ids) if self.number[id] != i)
            raise InputError(f"{', '.join(p[0] for p in self.parts)}: the id {twice!r} occurs twice in the corpus; make ids unique")
        self.files = {}

    def __len__(self):
        return len(self.ids)

    def add_file(self, path):
        first, offsets, start, header = len(self.ids), [], 0, None
        lines = read_lines(path)
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if text.strip() and number == 1 and not text.startswith("{"):
                header = text.split("\t")
                if "id" not in header or "text" not in header:
                    raise InputError(f"{path}:1: neither JSON lines nor a table whose header names id and text")
            elif text.strip():
                row = self.parse(text, header, f"{path}:{number}")
                found = next((row[key] for key in ("_id", "id", "docid", "doc_id", "passage_id") if key in row), None)
                self.ids.append(str(len(self.ids) if found is None else found))
                offsets.append(line if isinstance(lines, list) else start)
                if number <= 2:
                    self.format(row, f"{path}:{number}")
            start += len(line)
        if not offsets:
            raise InputError(f"{path}: holds no documents")
        self.parts.append((path, header, offsets if isinstance(lines, list) else np.array(offsets), first))

    @staticmethod
    def parse(text, header, place):
        if header is None:
            path, number = place.rsplit(":", 1)
            return parse_json(text, path, int(number))
        cells = next(csv.reader([text], delimiter="\t"))
        if len(cells) != len(header):
            raise InputError(f"{place}: {len(cells)} columns, the header names {len(header)}; the line may be cut off")
        return dict(zip(header, cells))

    def format(self, row, place):
        try:
            return format_key(row, self.template)
        except KeyError as error:
            raise InputError(f"{place}: no column {error} for --key_template '{self.template}'; its columns are "
                             f"{sorted(row)}") from None

    def row(self, number):
        """(columns, place) of a document."""
        path, header, offsets, first = next(part for part in reversed(self.parts) if part[3] <= number)
        line = offsets[number - first]
        if isinstance(offsets, np.ndarray):
            key = (os.getpid(), path)  # a worker process must not share a file position
            if key not in self.files:
                self.files[key] = open(path, "rb")
            self.files[key].seek(int(line))
            line = self.files[key].readline()
        place = f"{path}:{number - first + 1 + bool(header)}"
        return self.parse(line.decode("utf-8", "replace").rstrip("\r\n"), header, place), place

    def text(self, number):
        """The key text of a document, by the template."""
        return self.format(*self.row(number))

    def passage(self, number):
        """{id, title, text} of a document; answers are searched in the text alone."""
        row, _ = self.row(number)
        return {"id": self.ids[number], "title": row.get("title", ""), "text": row.get("text", row.get("content", ""))}


def read_lines(path):
    """The lines of a file as bytes: the open file, or a list if it is gzipped or one JSON list. Raises InputError."""
    try:
        if str(path).endswith(".gz"):
            with open_text(path) as file:
                return [line.encode() for line in file]
        with open(path, "rb") as file:
            if file.read(1) == b"[":
                return [json.dumps(row).encode() for row, _ in read_json(path)]
        return open(path, "rb")
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path") from None


def format_key(key, template):
    """The text of a key: itself, or its columns in the template; KeyError for a column it lacks."""
    return key if isinstance(key, str) else template.format_map({"title": "", **key}).strip()


def read_queries(paths):
    """{id: text} of BEIR's queries.jsonl, id <tab> text, or records with query or question. Raises InputError."""
    queries = {}
    for path in paths:
        for number, line in enumerate(read_lines(path), 1):
            place, text = f"{path}:{number}", line.decode("utf-8", "replace").rstrip("\r\n")
            if not text.strip():
                continue
            if text.startswith("{"):
                row = parse_json(text, path, number)
                id = next((row[key] for key in ("_id", "id", "query_id", "qid") if key in row), None)
                query = row.get("text", row.get("query", row.get("question")))
            else:
                id, _, query = text.partition("\t")
            if id is None or not isinstance(query, str) or not query.strip():
                raise InputError(f"{place}: a query needs an id and a text")
            queries[str(id)] = query
    return queries


# ---------------------------------------------------------------------------------------------------- qrels

def read_qrels(path):
    """{query id: {document id: score}} of TREC (query, 0, document, score), BEIR (header and three columns) or JSONL."""
    qrels = defaultdict(dict)
    for number, line in enumerate(read_lines(path), 1):
        text = line.decode("utf-8", "replace").strip()
        if text.startswith("{"):
            row = parse_json(text, path, number)
            cells = [row.get("qid"), row.get("docid"), row.get("score")]
        else:
            cells = text.split("\t") if "\t" in text else text.split()
            cells = [cells[0], cells[2], cells[3]] if len(cells) == 4 else cells
        try:
            query, document, score = cells
            qrels[str(query)][str(document)] = float(score)
        except (TypeError, ValueError):
            if text and number > 1 or text.startswith("{"):
                raise InputError(f"{path}:{number}: not a qrel; query, 0, document, score is wanted, or without the 0") from None
    if not qrels:
        raise InputError(f"{path}: holds no qrels")
    return dict(qrels)


def select_qrels(spec, seed=0):
    """The qrels of one --positives, --negatives or --graded flag: qrels=FILE and any of Trove's filters, applied in this order.

    query_subset=FILE (ids, or qrels naming them), min_score (inclusive), max_score (exclusive), first_k, random_k, top_k,
    bottom_k (per query), score=NUMBER|floor|ceil (the label given to what is left). Raises InputError.
    """
    try:
        options = dict(part.split("=", 1) for part in spec.split(","))
        limits = {key: float(options[key]) for key in ("min_score", "max_score") if key in options}
        counts = {key: int(options[key]) for key in ("first_k", "random_k", "top_k", "bottom_k") if key in options}
    except ValueError:
        raise InputError(f"'{spec}' is not qrels=FILE,name=value,... with numbers for scores and counts") from None
    unknown = options.keys() - {"qrels", "query_subset", "score", *limits, *counts}
    if "qrels" not in options or unknown:
        raise InputError(f"'{spec}': " + (f"unknown filter {min(unknown)}" if unknown else "qrels=FILE is missing"))
    qrels = read_qrels(options["qrels"])
    if "query_subset" in options:
        kept = {line.decode().split()[0] for line in read_lines(options["query_subset"]) if line.strip()}
        qrels = {query: own for query, own in qrels.items() if query in kept}
    selected = {}
    for query, own in qrels.items():
        pairs = [(d, s) for d, s in own.items() if limits.get("min_score", -math.inf) <= s < limits.get("max_score", math.inf)]
        for key, count in counts.items():
            if key == "random_k":
                pairs = random.Random(f"{seed}/{query}").sample(pairs, min(count, len(pairs)))
            elif key != "first_k":
                pairs.sort(key=lambda pair: pair[1], reverse=key == "top_k")
            pairs = pairs[:count]
        if pairs:
            selected[query] = {document: relabel(score, options.get("score")) for document, score in pairs}
    return selected


def relabel(score, rule):
    if rule in (None, "floor", "ceil"):
        return score if rule is None else float({"floor": math.floor, "ceil": math.ceil}[rule](score))
    try:
        return float(rule)
    except ValueError:
        raise InputError(f"score={rule}: must be a number, floor or ceil") from None


def merge_qrels(specs, seed=0):
    """The union of several flags' qrels; where they disagree the later one holds."""
    merged = defaultdict(dict)
    for spec in specs:
        for query, own in select_qrels(spec, seed).items():
            merged[query].update(own)
    return dict(merged)
