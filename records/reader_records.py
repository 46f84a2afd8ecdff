"""Read questions with ranked contexts for the reader, and log what they lack."""
import os

from records.fields import (
    check_types,
    gold_answers,
    gold_passages,
    has_text,
    history_turns,
    is_context,
    question_text,
    record_id,
)
from records.names import CONTEXT_NAMES, DOCUMENT_ID_NAMES, find_name, find_value
from records.questions import refuse_table
from records.reading import iterate_json, to_number
from records.record_file import open_record_file
from utils import InputError, log_on_main, shorten


def read_records(path, keep_contexts=None, log=log_on_main):
    """Return the checked records of a file, with their contexts in the reader's order: a list, or
    RecordsOnDisk of a large file.

    Every record gets `question`, `answers` (may be empty), `ctxs` and `id`; other fields are kept.
    If the file's first context has a score, contexts are sorted by descending score, with ties in
    file order (FiD, src/data.py: sort_data) and contexts without a score last. At most
    `keep_contexts` are kept. A warning is logged if all scores rise. Raises InputError.
    """
    refuse_table(path, "run retrieve.py first, whose --output FILE.jsonl has contexts")
    file = open_record_file(path, "reader", inspect_record)
    if file is not None:
        return RecordsOnDisk(file, keep_contexts, log)
    records, order = [], ScoreOrder()
    for index, (item, location) in enumerate(iterate_json(path)):
        record = check_record(item, location, index)
        order.add(describe_scores(record["ctxs"]))
        record["ctxs"] = order.choose(record["ctxs"], keep_contexts)
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records")
    note_rising(order.orders, path, log)
    return records


class RecordsOnDisk:
    """Hold the records of a large file as a sequence. A record is read each time it is asked for.
    """

    def __init__(self, file, keep_contexts, log):
        """file: a RecordFile of the table `reader`; the other arguments: see read_records."""
        self.file, self.keep_contexts = file, keep_contexts
        self.change = None  # see change_contexts
        self.order = ScoreOrder()
        for facts in file.facts():
            self.order.add(facts)
        note_rising(self.order.orders, file.path, log)

    def __len__(self):
        return len(self.file)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index):
        """Return a checked record, or the list of records of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # raises IndexError
        item, location = self.file[index]
        record = check_record(item, location, index)
        record["ctxs"] = self.order.choose(record["ctxs"], self.keep_contexts)
        if self.change is not None:
            record["ctxs"] = self.change(record)
        return record

    def facts(self):
        """Yield what describe_record returns for each record."""
        if self.change is not None:
            yield from map(describe_record, self)
            return
        for facts in self.file.facts():
            if self.keep_contexts is not None:
                facts["num_contexts"] = min(facts["num_contexts"], self.keep_contexts)
            yield facts


class ScoreOrder:
    """Choose a file's order of contexts: by descending score if its first context has a score."""

    def __init__(self):
        self.is_sorted = None  # unknown before the first context
        self.orders = []       # rank_order of each record with contexts

    def add(self, facts):
        """Add what describe_scores returns for the next record."""
        if facts["num_contexts"] and self.is_sorted is None:
            self.is_sorted = facts["has_score"]
        if self.is_sorted and facts["num_contexts"]:
            self.orders.append(facts["order"])

    def choose(self, contexts, count):
        """Return the first `count` contexts in the file's order; None: all."""
        if self.is_sorted:
            contexts = sorted(contexts, key=context_score, reverse=True)
        return contexts[:count]


# ---------------------------------------------------------------- facts about records

def read_facts(records):
    """Yield what describe_record returns for each record; of RecordsOnDisk, without reading them.
    """
    if isinstance(records, RecordsOnDisk):
        return records.facts()
    return map(describe_record, records)


def inspect_record(item, location, index):
    """Check a record, and return the facts about it that RecordsOnDisk needs. Raises InputError."""
    record = check_record(item, location, index)
    return describe_record(record) | describe_scores(record["ctxs"])


def describe_record(record):
    """Return the facts about a record that are checked before training or prediction:

    id, answers, target   the record's fields, without target if it has none
    num_contexts          contexts
    num_unscored          contexts without a retriever's score
    num_gold              ground-truth passages
    num_bytes             bytes of the question and the longest title

    For RecordsOnDisk, num_unscored and num_bytes also count contexts that are not kept.
    """
    contexts = record.get("ctxs", [])
    titles = [context.get("title") or "" for context in contexts]
    longest = max((len(title.encode()) for title in titles), default=0)
    facts = {"id": record.get("id"), "answers": record.get("answers", []),
             "num_contexts": len(contexts),
             "num_unscored": sum(not has_retrieval_score(context) for context in contexts),
             "num_gold": len(gold_passages(record)),
             "num_bytes": len(record.get("question", "").encode()) + longest}
    if record.get("target") is not None:
        facts["target"] = record["target"]
    return facts


def describe_scores(contexts):
    """Return {num_contexts, has_score, whether the first has one, order, by rank_order} of contexts
    as they are in the file.
    """
    scores = [context_score(context) for context in contexts if "retrieval_score" not in context]
    return {"num_contexts": len(contexts), "has_score": bool(contexts) and "score" in contexts[0],
            "order": rank_order(scores)}


def change_contexts(records, change):
    """Replace each record's `ctxs` by change(record); of RecordsOnDisk, whenever one is read."""
    if isinstance(records, RecordsOnDisk):
        records.change = change
        return
    for record in records:
        record["ctxs"] = change(record)


# ---------------------------------------------------------------- scores of contexts

def rank_order(scores):
    """Return "rising" or "other" for the order of scores, or None if fewer than three differ."""
    if len(set(scores)) < 3:
        return None
    return "rising" if scores == sorted(scores) else "other"


def note_rising(orders, path, log):
    """Log a warning if the scores of all questions rise with the rank, as distances do.

    orders: rank_order of each question.
    """
    if set(orders) - {None} == {"rising"} and orders.count("rising") > 1:
        log(f"warning: {path}: the scores of every question rise, as distances do, but the highest "
            "score ranks first; if they are distances, negate them")


def context_score(context):
    """Return a context's score as a number, or -inf if it has none."""
    score = context.get("score")
    return float("-inf") if score is None else to_number(score)


def retrieval_score(context):
    """Return the score that a retriever gave a context, or None.

    test.py --scores moves it to `retrieval_score` and stores the reader's score as `score`.
    """
    return context.get("retrieval_score" if "retrieval_score" in context else "score")


def has_retrieval_score(context):
    """Return True if a context has a retriever's score that is a finite number."""
    try:
        to_number(retrieval_score(context))
        return True
    except ValueError:
        return False


def check_record(record, location, index):
    """Return a copy of a record with the fields that the reader uses, checked.

    `index` becomes the id of a record that has no id. Raises InputError.
    """
    question = question_text(record, location)
    record = dict(record, question=question)
    identifier = record_id(record, location)
    record["id"] = index if identifier is None else identifier
    record["answers"], target = gold_answers(record, location)
    if isinstance(record.get("target"), str) and not has_text(record["target"]):
        del record["target"]
    if target is not None and record.get("target") is None:
        record["target"] = target
    if not isinstance(record.get("target", ""), (str, type(None))):
        raise InputError(f"{location}: 'target' must be a text, got {shorten(record['target'])}")
    take_contexts(record)
    check_types(record, location, ["ctxs"])
    gold_passages(record, location)
    history_turns(record, location)
    record["ctxs"] = list(record.get("ctxs") or [])
    for context in record["ctxs"]:
        for name in ("score", "retrieval_score"):
            check_score(context, name, location)
    return record


def check_score(context, name, location):
    """Raise InputError if a context has a score of this name that is not a number."""
    try:
        if context.get(name) is not None:
            to_number(context[name])
    except ValueError:
        raise InputError(f"{location}: a context's {name} {shorten(context[name])} is not a "
                         "number") from None


def take_contexts(record):
    """Move contexts from another field (names.CONTEXT_NAMES) to `ctxs`, and set their `id`."""
    name = find_name(record, CONTEXT_NAMES)
    if record.get("ctxs") is None and name is not None:
        contexts = record[name]
        if isinstance(contexts, list) and all(map(is_context, contexts)):
            record["ctxs"] = record.pop(name)
    if isinstance(record.get("ctxs"), list):
        record["ctxs"] = [name_context_id(context) for context in record["ctxs"]]


def name_context_id(context):
    """Return a context with its id under the name `id`, whatever name the file uses."""
    if not isinstance(context, dict) or context.get("id") is not None:
        return context
    identifier = find_value(context, DOCUMENT_ID_NAMES)
    return context if identifier is None else {"id": identifier} | context


def note_contexts(records, path, num_contexts, log):
    """Log how many records of a file have no contexts, or that all have fewer than num_contexts.

    Without contexts the reader gets the question alone.
    """
    counts = [facts["num_contexts"] for facts in read_facts(records)]
    most = max(counts, default=0)
    if 0 < most < num_contexts:
        log(f"note: no record of {path} has more than {most} contexts, fewer than --num_contexts "
            f"{num_contexts}")
    without = counts.count(0)
    if without == len(records):
        log(f"warning: 0 of {len(records)} records of {path} have contexts: run retrieve.py first; "
            "without contexts the reader gets only the questions")
    elif without:
        log(f"note: {without} of {len(records)} records of {path} have no contexts")


def count_unscored(records):
    """Return how many records have no answers."""
    return sum(not facts["answers"] for facts in read_facts(records))


def note_unscored(records, path, log):
    """Log how many records of a file have no answers; they are left out of the measures."""
    unscored = count_unscored(records)
    if unscored and unscored == len(records):
        log(f"note: no record of {path} has answers: nothing is measured on it; test.py OUT {path} "
            "--pred FILE writes the reader's answers")
    elif unscored:
        log(f"note: {unscored} of {len(records)} records of {path} have no answers: they are not "
            "scored")


def note_files(files, num_contexts, log):
    """Log note_contexts for each of `files`, and log if the training file is also evaluated on.

    files: [(path, records or None)], the training file first.
    """
    training_path, _ = files[0]
    for index, (path, records) in enumerate(files):
        if records is None:
            continue
        if index > 0 and os.path.samefile(path, training_path):
            log(f"note: {path} is also the training file: its measures do not show how well new "
                "questions are answered")
        else:
            note_contexts(records, path, num_contexts, log)
