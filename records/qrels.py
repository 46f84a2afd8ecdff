"""Read relevance judgments (qrels) in TREC's, BEIR's and JSON formats; apply Trove's filters."""
import math
import random
from collections import defaultdict

from records.json_values import parse_json
from records.names import (
    PAIR_DOCUMENT_NAMES,
    PAIR_QUERY_NAMES,
    QUESTION_ID_NAMES,
    SCORE_NAMES,
    find_name,
    find_value,
)
from records.reading import (
    choose_delimiter,
    decode_line,
    holds_scores,
    read_cells,
    read_lines,
    to_number,
)
from utils import InputError, shorten

COLUMNS = (PAIR_QUERY_NAMES, PAIR_DOCUMENT_NAMES, SCORE_NAMES)
LIMITS = ("min_score", "max_score")
CUTS = ("first_k", "random_k", "top_k", "bottom_k")


def read_qrels(path):
    """Return {query id: {document id: score}} of a file.

    Formats are TREC's (query, 0, document, score), BEIR's (a header and three columns), both with
    blanks, tabs, commas or semicolons, and JSON lines. names.py has the names of the columns. A
    judgment may be repeated. Raises InputError for a line that is not a qrel, and, like
    trec_eval, for a document with two different labels.
    """
    qrels = defaultdict(dict)
    delimiter, columns = None, None
    is_first = True
    for line_number, line in enumerate(read_lines(path), 1):
        location = f"{path}:{line_number}"
        text = decode_line(line, path, line_number).strip()
        if not text:
            continue
        if text.startswith("{"):
            rows = read_objects(parse_json(text, path, line_number), location)
        else:
            if is_first:
                delimiter = choose_separator(text)
            cells = split_cells(text, delimiter)
            if is_first:
                columns = read_header(cells, location)
                if columns:
                    is_first = False
                    continue
            rows = [pick_columns(cells, columns)]
        is_first = False
        for cells in rows:
            add_qrel(qrels, cells, location)
    if not qrels:
        raise InputError(f"{path}: holds no qrels")
    return dict(qrels)


def add_qrel(qrels, cells, location):
    """Add the cells of a query, a document and a score to qrels. Raises InputError."""
    try:
        query, document, score = cells
        score = to_number(score)
    except ValueError:
        raise InputError(f"{location}: not a qrel; write query, 0, document, score, or query, "
                         "document, score (under a header such as query-id, corpus-id, "
                         "score)") from None
    given = qrels[query].setdefault(document, score)
    if given != score:
        raise InputError(f"{location}: document {shorten(document)} of query {shorten(query)} has "
                         f"the label {score:g} here and {given:g} before; keep one of them")


def read_objects(row, location):
    """Return [[query, document, score]] of a JSON object.

    It is one judgment, or pytrec_eval's {query: {document: score}}. Raises InputError.
    """
    if not isinstance(row, dict):
        raise InputError(f"{location}: not a qrel; it must be a JSON object")
    if holds_scores(row):
        return [[query, document, score] for query, scores in row.items()
                for document, score in scores.items()]
    names = find_columns(list(row), location)
    for name in names[:2]:
        if type(row[name]) not in (str, int):
            raise InputError(f"{location}: not a qrel; '{name}' must be a text or a number")
    query, document, score = (row[name] for name in names)
    return [[str(query), str(document), score]]


def find_columns(fields, location):
    """Return the names of the columns of query, document and score. Raises InputError."""
    found = [find_name(fields, names) for names in COLUMNS]
    if None in found:
        missing = ("query-id", "corpus-id", "score")[found.index(None)]
        raise InputError(f"{location}: not a qrel; it has no column '{missing}' (or another name "
                         f"for it), only {shorten(fields)}; rename the column that holds it")
    return found


def choose_separator(first_line):
    """Return the delimiter of a file's cells: a tab, None for blanks, a comma or a semicolon."""
    if "\t" in first_line:
        return "\t"
    return None if len(first_line.split()) > 2 else choose_delimiter(first_line)


def read_header(cells, location):
    """Return the positions of query, document and score in a header, or None for any other line.

    Raises InputError for a header without these columns.
    """
    try:
        to_number(cells[-1])
        return None  # the last cell is a score
    except ValueError:
        pass
    is_known = any(find_name(cells, names) for names in COLUMNS)
    if not is_known and len(cells) == 3 and not any(map(str.isdigit, "".join(cells))):
        return [0, 1, 2]  # a header with unknown names
    if not is_known or len(cells) < 3:
        return None
    return [cells.index(name) for name in find_columns(cells, location)]


def pick_columns(cells, columns):
    """Return the cells of query, document and score, by position if there is no header."""
    if columns:
        return [cells[column] for column in columns] if max(columns) < len(cells) else cells[:1]
    if len(cells) == 4:
        return [cells[0], *cells[2:]]  # TREC's second column is unused
    return cells


def split_cells(text, delimiter):
    """Return the cells of a line, stripped of blanks."""
    if delimiter in (",", ";"):
        return [cell.strip() for cell in next(read_cells([text], delimiter), [])]
    return [cell.strip() for cell in (text.split("\t") if "\t" in text else text.split())]


def select_qrels(spec, seed=0):
    """Return the qrels of a flag such as qrels=FILE,min_score=1,top_k=5 (Trove's filters).

    Filters are applied in this order, whatever the order in the flag:

    query_subset=FILE                    keep the queries in a file of ids, qrels or queries
    min_score=X, max_score=X             keep labels >= X, and < X
    first_k, random_k, top_k, bottom_k   keep this many documents per query
    score=NUMBER|floor|ceil              set, or round, the remaining labels

    Raises InputError.
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
    """Return the query ids in a file of ids, qrels or queries.

    They are in the column that the header names, else in the first column. Raises InputError.
    """
    queries = set()
    delimiter, column = None, None
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number).strip()
        if text.startswith("{"):
            row = parse_json(text, path, line_number)
            identifier = find_value(row, (*PAIR_QUERY_NAMES[:-1], *QUESTION_ID_NAMES))
            found = list(row) if holds_scores(row) else [identifier]
            queries.update(str(query) for query in found if query is not None)
        elif text and column is None:  # the first line
            delimiter = choose_separator(text)
            cells = split_cells(text, delimiter)
            name = None
            if len(cells) > 1:
                name = find_name(cells, (*PAIR_QUERY_NAMES, *QUESTION_ID_NAMES))
            column = 0 if name is None else cells.index(name)
            queries.update([] if name else cells[:1])
        elif text:
            queries.update(split_cells(text, delimiter)[column:column + 1])
    return queries


def parse_spec(spec):
    """Return ({option: text}, {limit: score}, {cut: count}) of a flag. Raises InputError."""
    try:
        options = dict(part.split("=", 1) for part in spec.split(","))
        limits = {name: to_number(options[name]) for name in LIMITS if name in options}
        cuts = {name: int(options[name]) for name in CUTS if name in options}
    except ValueError:
        raise InputError(f"'{spec}' must be qrels=FILE,name=value,... with numbers for scores and "
                         "counts, and without commas in file names") from None
    known = {"qrels", "query_subset", "score", *LIMITS, *CUTS}
    unknown = options.keys() - known
    if unknown:
        raise InputError(f"'{spec}': unknown filter {min(unknown)}; the filters are "
                         f"{', '.join(sorted(known))}")
    negative = next((name for name, count in cuts.items() if count < 0), None)
    if negative:
        raise InputError(f"'{spec}': {negative} must be >= 0, got {cuts[negative]}")
    if "qrels" not in options:
        raise InputError(f"'{spec}': qrels=FILE is missing; add it")
    return options, limits, cuts


def list_qrels_files(spec):
    """Return the paths of the files in a qrels flag. Raises InputError."""
    options, _, _ = parse_spec(spec)
    return [options[name] for name in ("qrels", "query_subset") if name in options]


def cut_pairs(pairs, name, count, seed):
    """Return at most `count` of a query's pairs (document, score); `name` is one of CUTS."""
    if name == "random_k":
        return random.Random(seed).sample(pairs, min(count, len(pairs)))
    if name in ("top_k", "bottom_k"):
        pairs = sorted(pairs, key=lambda pair: pair[1], reverse=name == "top_k")
    return pairs[:count]


def relabel(score, rule):
    """Return the label that score=RULE gives; None keeps the score. Raises InputError."""
    if rule is None:
        return score
    if rule == "floor":
        return float(math.floor(score))
    if rule == "ceil":
        return float(math.ceil(score))
    try:
        return to_number(rule)
    except ValueError:
        raise InputError(f"score must be a number, floor or ceil, got {rule}") from None


def merge_qrels(specs, seed=0):
    """Return the union of several flags' qrels; if two disagree on a label, the later one wins."""
    merged = defaultdict(dict)
    for spec in specs:
        for query, labels in select_qrels(spec, seed).items():
            merged[query].update(labels)
    return dict(merged)
