"""Relevance judgments (qrels): TREC's, BEIR's and JSON files, and Trove's filters of them."""
import math
import random
from collections import defaultdict

from files import decode_line, parse_json, read_lines, to_number
from utils import InputError

LIMITS = ("min_score", "max_score")
CUTS = ("first_k", "random_k", "top_k", "bottom_k")


def read_qrels(path):
    """{query id: {document id: score}} of a file. Raises InputError for a line that is no qrel.

    Forms: TREC's (query, 0, document, score), BEIR's (a header and three columns), or JSON lines
    with qid, docid and score.
    """
    qrels = defaultdict(dict)
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number).strip()
        if not text:
            continue
        if text.startswith("{"):
            cells = split_json(text, path, line_number)
        else:
            cells = split_line(text)
        if line_number == 1 and len(cells) == 3 and not any(map(str.isdigit, text)):
            continue  # a header
        try:
            query, document, score = cells
            qrels[query][document] = to_number(score)
        except ValueError:
            raise InputError(f"{path}:{line_number}: not a qrel; it must be query, 0, document, "
                             "score, or the same without the 0 (a header: three names without "
                             "digits)") from None
    if not qrels:
        raise InputError(f"{path}: holds no qrels")
    return dict(qrels)


def split_json(text, path, line_number):
    """[query, document, score] of a JSON object. Raises InputError for ids of other types."""
    row = parse_json(text, path, line_number)
    for name in ("qid", "docid"):
        if type(row.get(name)) not in (str, int):
            raise InputError(f"{path}:{line_number}: not a qrel; '{name}' must be a text or a "
                             "number")
    return [str(row["qid"]), str(row["docid"]), row.get("score")]


def split_line(text):
    """The cells of a line: query, document and score."""
    cells = text.split("\t") if "\t" in text else text.split()
    if len(cells) == 4:
        del cells[1]  # TREC's second column, which means nothing
    return cells


def select_qrels(spec, seed=0):
    """The qrels of a flag such as qrels=FILE,min_score=1,top_k=5, with any of Trove's filters.

    Applied in this order: query_subset=FILE keeps queries (ids, or qrels naming them); min_score
    (inclusive) and max_score (exclusive) keep labels; first_k, random_k, top_k and bottom_k keep so
    many per query; score=NUMBER|floor|ceil sets the label of what is left. Raises InputError.
    """
    options, limits, cuts = parse_spec(spec)
    qrels = read_qrels(options["qrels"])
    if "query_subset" in options:
        kept_queries = read_subset(options["query_subset"])
        qrels = {query: labels for query, labels in qrels.items() if query in kept_queries}
    least, most = limits.get("min_score", -math.inf), limits.get("max_score", math.inf)
    selected = {}
    for query, labels in qrels.items():
        pairs = [(document, score) for document, score in labels.items() if least <= score < most]
        for name, count in cuts.items():
            pairs = cut_pairs(pairs, name, count, f"{seed}/{query}")
        if pairs:
            rule = options.get("score")
            selected[query] = {document: relabel(score, rule) for document, score in pairs}
    return selected


def read_subset(path):
    """The queries that a file of ids, or of qrels, names first in its lines. Raises InputError."""
    queries = set()
    for line_number, line in enumerate(read_lines(path), 1):
        cells = decode_line(line, path, line_number).split()
        queries.update(cells[:1])
    return queries


def parse_spec(spec):
    """({option: text}, {limit: score}, {cut: count}) of a flag. Raises InputError."""
    try:
        options = dict(part.split("=", 1) for part in spec.split(","))
        limits = {name: to_number(options[name]) for name in LIMITS if name in options}
        cuts = {name: int(options[name]) for name in CUTS if name in options}
    except ValueError:
        raise InputError(f"'{spec}' is not qrels=FILE,name=value,... with numbers for scores and "
                         "counts") from None
    unknown = options.keys() - {"qrels", "query_subset", "score", *LIMITS, *CUTS}
    if unknown:
        raise InputError(f"'{spec}': unknown filter {min(unknown)}")
    negative = next((name for name, count in cuts.items() if count < 0), None)
    if negative:
        raise InputError(f"'{spec}': {negative} is {cuts[negative]}; it must be 0 or more")
    if "qrels" not in options:
        raise InputError(f"'{spec}': qrels=FILE is missing")
    return options, limits, cuts


def cut_pairs(pairs, name, count, seed):
    """At most `count` of a query's (document, score)."""
    if name == "random_k":
        return random.Random(seed).sample(pairs, min(count, len(pairs)))
    if name in ("top_k", "bottom_k"):
        pairs = sorted(pairs, key=lambda pair: pair[1], reverse=name == "top_k")
    return pairs[:count]


def relabel(score, rule):
    """A label by the rule of score=: kept (None), floor, ceil, or a number. Raises InputError."""
    if rule is None:
        return score
    if rule == "floor":
        return float(math.floor(score))
    if rule == "ceil":
        return float(math.ceil(score))
    try:
        return to_number(rule)
    except ValueError:
        raise InputError(f"score={rule}: must be a number, floor or ceil") from None


def merge_qrels(specs, seed=0):
    """The union of several flags' qrels; where they disagree the later one holds."""
    merged = defaultdict(dict)
    for spec in specs:
        for query, labels in select_qrels(spec, seed).items():
            merged[query].update(labels)
    return dict(merged)
