"""Relevance judgments: TREC's, BEIR's and JSON files, and Trove's filters of them."""
import math
import random
from collections import defaultdict

from corpus import read_lines
from data import parse_json
from utils import InputError


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
    """A label by the rule of score=: none, floor, ceil, or the number that it is. Raises InputError."""
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
