"""Training examples of a retriever, read from any of the field's files.

The files: LLM-Embedder's records (query, pos, neg, history, teacher_scores, task), DPR's (question,
positive_ctxs, hard_negative_ctxs, negative_ctxs), a reader's records with scores of their ctxs, or
a corpus, queries and TREC or BEIR qrels with Trove's filters. A key is a text, a dictionary for the
key template, or the index of a document, whose text stays in the corpus's file.
"""
import os
from collections import Counter
from functools import partial
from itertools import chain
from typing import NamedTuple

from records.fields import KEY_FOLDS, check_types, find_keys, has_keys, labelled_keys, question_text
from records.files import describe_version
from records.names import (
    ANSWER_NAMES,
    DOCUMENT_ID_NAMES,
    HARD_NEGATIVE_NAMES,
    NEGATIVE_ID_NAMES,
    OTHER_NEGATIVE_NAMES,
    POSITIVE_ID_NAMES,
    POSITIVE_NAMES,
    QUESTION_NAMES,
    TITLE_NAMES,
    UNUSED_NAMES,
    find_name,
    find_value,
    fold,
)
from records.question_tables import read_named_columns, read_table_lines
from records.questions import holds_json, refuse_table
from records.reading import (
    choose_delimiter,
    decode_line,
    iterate_json,
    read_cells,
    read_lines,
    to_number,
)
from records.record_file import open_record_file
from records.templates import format_key
from utils import InputError, first_line, shorten

# remedies for records without positives and without teacher scores
MAKE_POSITIVES = ("retrieve.py --metrics collate_pos makes records with positives of questions and "
                  "answers")
MAKE_SCORES = ("test.py --scores FILE writes a reader's scores of the 'ctxs', lm_score.py writes "
               "'teacher_scores'; --reader_scores takes the 'score' of FiD's own files")


class Example(NamedTuple):
    """Hold a query with its pools of keys."""
    query: str
    pos: list                      # empty if no key is labelled as right
    neg: list
    scores: list | None = None     # a teacher's scores or relevance labels, of pos, then of neg
    task: str = ""
    location: str = ""
    instruction: str | None = None  # the record's own text before its query, if it has one


class Outline(NamedTuple):
    """Hold what is known of an example before it is read, to choose the examples to train on."""
    num_pos: int
    num_neg: int
    best: int | None       # index of the key with the highest score; None without scores
    highest: float | None  # the highest and the lowest score
    lowest: float | None
    task: str
    location: str
    instruction: str | None


def outline_example(example):
    """Return the Outline of an Example."""
    scores = example.scores or None
    best = scores and max(range(len(scores)), key=lambda index: scores[index])
    return Outline(len(example.pos), len(example.neg), best, scores and max(scores),
                   scores and min(scores), example.task, example.location, example.instruction)


class ExamplesOnDisk:
    """Hold the examples of a large file as a sequence. An example is made each time it is asked
    for.
    """

    def __init__(self, file, source):
        """file: a RecordFile of the table `retriever`."""
        self.file, self.source = file, source

    def __len__(self):
        return len(self.file)

    def __getitem__(self, index):
        record, location = self.file[index]
        return make_example(record, location, self.source)

    def outlines(self):
        """Yield the Outline of each example, without reading it."""
        for facts in self.file.facts():
            yield Outline(*facts["outline"])


def read_outlines(examples):
    """Yield the Outline of each of the examples, ExamplesOnDisk or a list."""
    if isinstance(examples, ExamplesOnDisk):
        return examples.outlines()
    return map(outline_example, examples)


# ---------------------------------------------------------------- qrels

def to_doc_indices(qrels, corpus, queries, source="the qrels", log=print):
    """Return the qrels {query id: {document id: score}} with doc indices instead of document ids.

    Drop queries that are not in `queries` and documents that are not in the corpus, and log how
    many. Raises InputError with the `source` of the qrels if nothing is left.
    """
    known = [query_id for query_id in qrels if query_id in queries]
    if qrels and not known:
        raise InputError(f"{source}: none of the queries, such as {shorten(next(iter(qrels)))}, is "
                         "in the query files; give their file with --queries")
    if len(known) < len(qrels):
        absent = next(query_id for query_id in qrels if query_id not in queries)
        log(f"note: {source}: {len(qrels) - len(known)} of {len(qrels)} queries are in none of the "
            f"query files (first: {shorten(absent)}); they are dropped")
    # one call for all documents, because a call per query would take longer
    pairs = [(query_id, document_id) for query_id in known for document_id in qrels[query_id]]
    doc_indices = corpus.indices([document_id for _, document_id in pairs])
    indexed = {query_id: {} for query_id in known}
    absent = []
    for (query_id, document_id), doc_index in zip(pairs, doc_indices):
        if doc_index < 0:
            absent.append(document_id)
        else:
            indexed[query_id][doc_index] = qrels[query_id][document_id]
    if absent and len(absent) == len(pairs):
        raise InputError(f"{source}: none of the documents, such as {shorten(absent[0])}, is in "
                         "the corpus; give their file with --corpus")
    if absent:
        log(f"note: {source}: {len(absent)} of {len(pairs)} labels are of documents that are not "
            f"in the corpus (first: {shorten(absent[0])}); they are dropped")
    return indexed


def qrels_examples(corpus, queries, positives, negatives, source="the qrels", log=print):
    """Return Examples of qrels of positives and of negatives. A document in both is a positive."""
    positives = to_doc_indices(positives, corpus, queries, source, log)
    negatives = to_doc_indices(negatives, corpus, queries, source, log)
    examples = []
    for query_id, positive_scores in positives.items():
        pos = list(positive_scores)
        neg = [doc_index for doc_index in negatives.get(query_id, {})
               if doc_index not in positive_scores]
        examples.append(Example(queries[query_id], pos, neg,
                                location=f"{source}, query {query_id}"))
    return examples


def graded_examples(corpus, queries, graded, group_size, source="the qrels", log=print):
    """Return Examples of graded qrels, with a query's labelled documents as neg and their labels as
    scores. Raises InputError for a query with fewer documents than the group size.
    """
    examples = []
    for query_id, labels in to_doc_indices(graded, corpus, queries, source, log).items():
        if len(labels) < group_size:
            raise InputError(f"{source}: query {shorten(query_id)} has {len(labels)} labelled "
                             f"documents, fewer than --group_size {group_size}; lower it, or leave "
                             "such queries out with query_subset")
        neg, scores = list(labels), list(labels.values())
        examples.append(Example(queries[query_id], [], neg, scores,
                                location=f"{source}, query {query_id}"))
    return examples


# ---------------------------------------------------------------- records

class Source(NamedTuple):
    """Hold how a file's records are read, and what their ids refer to."""
    template: str = "{title} {text}"
    reader_scores: bool = False  # --reader_scores, see find_scored_contexts
    distills: bool = False       # the loss is a distillation alone, see trains_on_contexts
    corpus: object = None        # for records with ids of documents
    queries: dict | None = None  # {id: text}, for triples of ids


NO_SOURCE = Source()


def read_examples(path, source=NO_SOURCE, log=print):
    """Return the examples of a file of records (LLM-Embedder's, DPR's, Tevatron's, a reader's with
    scores), of triplets, or of a table of triples; log which fields are not used. They are a list,
    or ExamplesOnDisk of a large file of records.

    Raises InputError with the location of a wrong field, or of a key that lacks a column of the
    template.
    """
    triples = read_triples(path, source)
    if triples is None:
        refuse_table(path, MAKE_POSITIVES)
        file = open_record_file(path, "retriever", partial(inspect_example, source=source),
                                describe_source(source))
        if file is not None:
            note_unused((facts["unused"] for facts in file.facts()), path, log)
            return ExamplesOnDisk(file, source)
    examples, unused = [], []
    for record, location in iterate_json(path) if triples is None else triples:
        examples.append(make_example(record, location, source))
        unused.append(unused_fields(record))
    if not examples:
        raise InputError(f"{path}: holds no records")
    note_unused(unused, path, log)
    return examples


def inspect_example(record, location, index, source):
    """Check a record, and return the facts about it that ExamplesOnDisk needs. Raises InputError.
    """
    example = make_example(record, location, source)
    return {"outline": outline_example(example), "unused": unused_fields(record)}


def describe_source(source):
    """Return what the facts of inspect_example depend on, besides the record, for JSON."""
    parts = source.corpus.parts if source.corpus else []
    return {"template": source.template, "reader_scores": source.reader_scores,
            "distills": source.distills,
            "corpus": [[part.path, *describe_version(os.stat(part.path))] for part in parts]}


def note_unused(unused, path, log):
    """Log the unused_fields of all records of a file, with the number of records that have them."""
    counts = Counter(chain.from_iterable(unused))
    if counts:
        fields = ", ".join(f"'{name}' ({count})" for name, count in counts.items())
        log(f"note: {path}: fields that training does not use, and the records that have them: "
            f"{fields}")


def make_example(record, location, source=NO_SOURCE):
    """Return the Example of a record. Raises InputError."""
    query = question_text(record, location)
    check_types(record, location)
    check_types(record, location, ["history", "ctxs"])
    if trains_on_contexts(record, source.reader_scores, source.distills):
        pos = []  # no context is labelled as right
        neg, scores = find_scored_contexts(record, location, source.reader_scores)
    else:
        pos, neg = labelled_keys(record)
        if not pos and not neg:
            pos, neg = named_documents(record, location, source.corpus)
        scores = find_teacher_scores(record)
    for key in pos + neg:
        if not isinstance(key, int):
            format_key(key, source.template, location)
    if scores is not None:
        scores = read_teacher_scores(scores, pos, neg, location)
    instruction = record.get("prompt")
    if not isinstance(instruction, (str, type(None))):
        raise InputError(f"{location}: 'prompt', the instruction before the query, must be a text, "
                         f"got {shorten(instruction)}")
    return Example(query, pos, neg, scores, record.get("task") or "", location, instruction)


def find_teacher_scores(record):
    """Return a record's teacher_scores, or FlagEmbedding's pos_scores and neg_scores, or None."""
    if record.get("teacher_scores") is not None:
        return record["teacher_scores"]
    parts = [record.get(name) for name in ("pos_scores", "neg_scores")]
    if all(isinstance(part, list) for part in parts) and any(parts):
        return parts[0] + parts[1]
    return None


def named_documents(record, location, corpus):
    """Return (positives, negatives), as indices, of a record with ids of documents.

    Raises InputError for an id that is not in the corpus.
    """
    lists = []
    for names in (POSITIVE_ID_NAMES, NEGATIVE_ID_NAMES):
        ids = find_value(record, names) or []
        if ids and corpus is None:
            raise InputError(f"{location}: '{find_name(record, names)}' names documents by their "
                             "ids; give the corpus with --corpus")
        if not isinstance(ids, list):
            raise InputError(f"{location}: '{find_name(record, names)}' must be a list of ids, got "
                             f"{shorten(ids)}")
        lists.append(find_documents(list(map(str, ids)), corpus, location))
    return lists


def find_documents(ids, corpus, location):
    """Return the indices of documents by their ids. Raises InputError for an unknown id."""
    indices = corpus.indices(ids) if ids else []
    for identifier, index in zip(ids, indices):
        if index < 0:
            raise InputError(f"{location}: document {shorten(identifier)} is not in the corpus; "
                             "give its file with --corpus")
    return indices


def unused_fields(record):
    """Return the fields of a record that change training in its format's own code but not here."""
    names = [name for name in UNUSED_NAMES if record.get(name) is not None]
    scores = [name for name in ("pos_scores", "neg_scores") if record.get(name)]
    if len(scores) == 1 or record.get("teacher_scores") is not None:
        names += scores
    hard = find_keys(record, HARD_NEGATIVE_NAMES)
    if hard:
        names += [name for name in OTHER_NEGATIVE_NAMES if find_keys(record, [name])]
    negatives = hard or find_keys(record, OTHER_NEGATIVE_NAMES)
    used = {id(keys) for keys in (find_keys(record, POSITIVE_NAMES), negatives)}
    for name in record:
        keys = record[name]
        if (fold(name) in KEY_FOLDS and name not in names and isinstance(keys, (list, dict))
                and keys and id(keys) not in used):
            names.append(name)
    return names


# ---------------------------------------------------------------- triples

def read_triples(path, source):
    """Return [(record, location)] of a table of triples, or of a table whose header names these
    columns; None for any other file.

    A triple is query, positive and negative: texts or, with --queries and --corpus, ids as in MS
    MARCO. Raises InputError.
    """
    if holds_json(path):
        return None
    lines = enumerate(read_lines(path), 1)
    line_number, line = next(((number, line) for number, line in lines if line.strip()), (1, b""))
    text = decode_line(line, path, line_number)
    delimiter = choose_delimiter(text)
    names = [name.strip() for name in next(read_cells([text], delimiter), [])]
    if find_name(names, QUESTION_NAMES) and find_name(names, POSITIVE_NAMES):
        return read_named_columns(path, read_table_lines(path), names, delimiter)
    cells = text.split("\t") if "\t" in text else text.split()
    is_header = find_name(names, (*QUESTION_NAMES, *DOCUMENT_ID_NAMES, *TITLE_NAMES,
                                  *ANSWER_NAMES)) is not None
    if len(cells) != 3 or is_header or (
            "\t" not in text and not all(map(str.isdecimal, cells))):
        return None
    are_ids = all(cell.strip().isdecimal() for cell in cells) or (source.queries
                                                                  and cells[0] in source.queries)
    if are_ids and not (source.queries and source.corpus):
        raise InputError(f"{path}:{line_number}: is a triple of ids; give the texts with --queries "
                         "and --corpus")
    rows = []
    for number, row in chain([(line_number, line)], lines):
        if row.strip():
            location = f"{path}:{number}"
            text = decode_line(row, path, number)
            rows.append((make_triple(text, are_ids, source, location), location))
    return rows


def make_triple(text, are_ids, source, location):
    """Return the record of a line of three cells. Raises InputError."""
    cells = text.split("\t") if "\t" in text else text.split()
    if len(cells) != 3 or not all(cell.strip() for cell in cells):
        raise InputError(f"{location}: is not a triple; it must be query, positive and negative, "
                         "with tabs between them")
    if not are_ids:
        return dict(zip(("query", "positive", "negative"), cells))
    query_id, *document_ids = (cell.strip() for cell in cells)
    if query_id not in source.queries:
        raise InputError(f"{location}: query {shorten(query_id)} is in none of the query files; "
                         "give its file with --queries")
    return {"query": source.queries[query_id], "positive_ids": document_ids[:1],
            "negative_ids": document_ids[1:]}


# ---------------------------------------------------------------- contexts with a reader's scores

def trains_on_contexts(record, reader_scores, distills):
    """Return True to train on a record's `ctxs`: it has no other keys, or the loss distils and only
    the ctxs have scores.
    """
    if not record.get("ctxs"):
        return False
    if not has_keys(record):
        return True
    is_scored = reader_scores or any("retrieval_score" in context for context in record["ctxs"])
    return distills and is_scored and record.get("teacher_scores") is None


def find_scored_contexts(record, location, reader_scores):
    """Return (contexts, their scores or None) of a reader's record.

    The scores are the record's `teacher_scores`, one per context, or the contexts' own `score`. A
    retriever must not learn from its own scores, so `score` counts only if test.py --scores has set
    it. test.py moves the retriever's score to `retrieval_score`; contexts that it has not read are
    left without a `score`.

    reader_scores: every `score` is a reader's, as in FiD's own files. Raises InputError for a
    context without such a score.
    """
    contexts = record["ctxs"]
    if record.get("teacher_scores") is not None:
        return contexts, record["teacher_scores"]
    if not reader_scores:
        contexts = [context for context in contexts if "retrieval_score" in context
                    and context.get("score") is not None]
    elif any("retrieval_score" in context for context in contexts):
        contexts = [context for context in contexts if context.get("score") is not None]
    if not contexts:
        return record["ctxs"], None
    scores = [context.get("score") for context in contexts]
    if None in scores:
        raise InputError(f"{location}: context {scores.index(None)} has no 'score' of a reader; "
                         f"{MAKE_SCORES}")
    return contexts, scores


def read_teacher_scores(scores, pos, neg, location):
    """Return teacher scores as floats. Raises InputError unless they are one number per key."""
    if not isinstance(scores, list):
        raise InputError(f"{location}: 'teacher_scores' must be a list, got {shorten(scores)}")
    if len(scores) != len(pos) + len(neg):
        raise InputError(f"{location}: {len(scores)} teacher_scores for {len(pos)} positives and "
                         f"{len(neg)} negatives (or history, or ctxs); there must be one per key, "
                         "positives first")
    try:
        return [to_number(score) for score in scores]
    except ValueError as error:
        raise InputError(f"{location}: teacher scores must be finite numbers "
                         f"({first_line(error)})") from None
