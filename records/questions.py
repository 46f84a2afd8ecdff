"""Questions and their fields, in every file form of the field: one rule for reader and retriever.

A record is a JSON object per question: `question` (or `query`, or BEIR's `text`), an id, `answers`
(or `answer`), `target`, `ctxs` (ranked passages {title, text, score}), `passage` (ground truth) and
`chat_history` (earlier turns). Files: a `.json` list or `.jsonl`; tables whose header names the
columns, or without one of question and answers (DPR's nq-test.csv) or of id and text;
any of them gzipped.
"""
from typing import NamedTuple

from records.fields import check_types, drop_missing, gold_answers, question_text, record_id
from records.names import (
    ANSWER_NAMES,
    CONTEXT_NAMES,
    HARD_NEGATIVE_NAMES,
    OTHER_NAMES,
    OTHER_NEGATIVE_NAMES,
    POSITIVE_NAMES,
    QUESTION_ID_NAMES,
    QUESTION_NAMES,
    TITLE_NAMES,
    find_name,
    list_unknown,
    may_hold_ids,
    spell_id,
)
from records.question_tables import read_table
from records.reading import read_json, read_lines
from utils import InputError, shorten

TABLE_ENDINGS = (".csv", ".tsv", ".txt")


class Question(NamedTuple):
    """A question for the retriever: its record as it was read, identifier, text, task, gold answers
    and FILE:LINE.
    """
    record: dict
    id: str
    text: str
    task: str
    answers: list
    location: str


def make_question(record, location, index, task=""):
    """Return the Question of a record; `index` is its id if it has none, `task` its task.

    Raises InputError.
    """
    text = question_text(record, location)
    check_types(record, location)
    identifier = record_id(record, location)
    if identifier is None:
        identifier = index
    answers, _ = gold_answers(record, location)
    return Question(record, spell_id(identifier), text, record.get("task") or task, answers,
                    location)


def read_questions(path, task=""):
    """The Questions of a file, whose first line tells its form; see the module's docstring.

    `task` is that of questions that name none. Raises InputError.
    """
    rows = read_json(path) if holds_json(path) else read_table(path)
    if not rows:
        raise InputError(f"{path}: holds no questions")
    questions = []
    for index, (record, location) in enumerate(rows):
        questions.append(make_question(record, location, index, task))
    return questions


def own_ids(questions):
    """Return the id that each question's record carries, as text; None where it carries none."""
    return [None if record_id(question.record, question.location) is None else question.id
            for question in questions]


def holds_json(path):
    """True for a file named .json or .jsonl, or whose first line with text begins as JSON does."""
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        return True
    first_line = next((line for line in read_lines(path) if line.strip()), b"")
    return first_line.lstrip().startswith((b"{", b"[{"))


def refuse_table(path, remedy):
    """Raises InputError, which ends with the remedy, for a table where records are needed."""
    if str(path).removesuffix(".gz").endswith(TABLE_ENDINGS) and not holds_json(path):
        raise InputError(f"{path}: a table of questions, where JSON records are needed; {remedy}")


# ---------------------------------------------------------------- queries of qrels

def require_ids(questions, purpose, log):
    """Raise InputError, for a purpose that goes by ids, if only some Questions have ids, or if a
    field might hold the ids and is not known by its name; log a line where positions are the ids.
    """
    without = [question for question in questions
               if record_id(question.record, question.location) is None]
    if not without:
        note_ids(questions[0], log)
        return
    first = without[0]
    unknown = list_unknown(first.record, QUESTION_NAMES, ANSWER_NAMES, TITLE_NAMES, POSITIVE_NAMES,
                           HARD_NEGATIVE_NAMES, OTHER_NEGATIVE_NAMES, CONTEXT_NAMES, OTHER_NAMES)
    unknown = [name for name in unknown
               if may_hold_ids([question.record.get(name) for question in questions])]
    if unknown or len(without) < len(questions):
        raise InputError(f"{first.location}: {purpose} by the questions' ids, and no field of this "
                         f"one is known to hold its id; its fields are "
                         f"{shorten(sorted(first.record))}; rename the one with the id to 'id', or "
                         "add one")
    log("note: the questions have no ids; their positions, from 0, are used")


def note_ids(question, log):
    """Log which field is the id, if a question has several that differ."""
    given = drop_missing(question.record)
    names = [name for name in given if find_name([name], QUESTION_ID_NAMES)]
    if len({str(given[name]) for name in names}) > 1:
        used = find_name(given, QUESTION_ID_NAMES)
        others = ", ".join(f"'{name}'" for name in names if name != used)
        log(f"note: {question.location}: '{used}' is the question's id; {others} is not used")


def read_unique_questions(paths, task=""):
    """{id: Question} of the questions that qrels name, which need ids of their own.

    Raises InputError for a question without an id, or an id with two texts.
    """
    questions = {}
    for path in paths:
        for question in read_questions(path, task):
            if record_id(question.record, question.location) is None:
                raise InputError(f"{question.location}: a query that qrels name needs an id; its "
                                 f"fields are {shorten(sorted(question.record))}")
            first = questions.setdefault(question.id, question)
            if first.text != question.text:
                raise InputError(f"{question.location}: the id {shorten(question.id)} is another "
                                 "query's already; make ids unique")
    return questions


def read_queries(paths):
    """{id: text} of read_unique_questions."""
    return {question.id: question.text for question in read_unique_questions(paths).values()}
