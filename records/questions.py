"""Read questions for retrieval, from every file format of the field.

Files are a `.json` list, `.jsonl`, or a table (records/question_tables.py), gzipped or not. A
table has a header, or the columns question and answers (DPR's nq-test.csv), or id and text.
"""
from typing import NamedTuple

from records.fields import check_types, gold_answers, question_text, record_id
from records.names import (
    ANSWER_NAMES,
    CONTEXT_NAMES,
    HARD_NEGATIVE_NAMES,
    OTHER_FIELD_NAMES,
    OTHER_NEGATIVE_NAMES,
    POSITIVE_NAMES,
    QUESTION_ID_NAMES,
    QUESTION_NAMES,
    TITLE_NAMES,
    drop_missing,
    find_name,
    list_unknown,
    may_hold_ids,
    spell_id,
)
from records.question_tables import read_table
from records.reading import read_json, read_lines
from records.record_file import RecordFile, open_record_file
from utils import InputError, shorten

TABLE_ENDINGS = (".csv", ".tsv", ".txt")


class RecordOnDisk(NamedTuple):
    """Name a record of a large file, which is read whenever it is asked for."""
    file: RecordFile
    index: int

    def read(self):
        """Return the record as it is in the file."""
        record, _ = self.file[self.index]
        return record


class Question(NamedTuple):
    """Hold a question for the retriever."""
    source: dict   # its record as it was read, or a RecordOnDisk
    id: str        # its index in the file if the record has no id
    text: str
    task: str      # chooses the instruction
    answers: list  # gold answers
    location: str  # FILE:LINE
    has_id: bool = True
    pos_index: list | None = None  # the record's positives, as documents' indices

    @property
    def record(self):
        """Return the record as it is in the file."""
        return self.source.read() if isinstance(self.source, RecordOnDisk) else self.source

    def read(self):
        """Return this Question with its record in memory, to use it more than once."""
        return self._replace(source=self.record)


def make_question(record, location, index, task=""):
    """Return the Question of a record. `index` and `task` are defaults for its id and its task.

    Raises InputError.
    """
    text = question_text(record, location)
    check_types(record, location)
    identifier = record_id(record, location)
    has_id = identifier is not None
    answers, _ = gold_answers(record, location)
    return Question(record, spell_id(identifier if has_id else index), text,
                    record.get("task") or task, answers, location, has_id, record.get("pos_index"))


def read_questions(path, task=""):
    """Return the Questions of a file, whose first line decides how it is read. The records of a
    large JSON file stay on disk.

    `task` is the default for questions without a task. Raises InputError.
    """
    if holds_json(path):
        file = open_record_file(path, "questions", inspect_question)
        if file is not None:
            return find_questions(file, task)
        rows = read_json(path)
    else:
        rows = read_table(path)
    if not rows:
        raise InputError(f"{path}: holds no questions")
    questions = []
    for index, (record, location) in enumerate(rows):
        questions.append(make_question(record, location, index, task))
    return questions


def inspect_question(record, location, index):
    """Check a record, and return its Question's fields after `source`. Raises InputError."""
    return make_question(record, location, index)[1:]


def find_questions(file, task):
    """Return the Questions of a RecordFile of the table `questions`."""
    questions = []
    for index, facts in enumerate(file.facts()):
        question = Question(RecordOnDisk(file, index), *facts)
        questions.append(question._replace(task=question.task or task))
    return questions


def own_ids(questions):
    """Return each question's id as text, or None if its record has no id."""
    return [question.id if question.has_id else None for question in questions]


def holds_json(path):
    """Return True for a .json or .jsonl file, or if its first line with text begins like JSON."""
    if str(path).removesuffix(".gz").endswith((".json", ".jsonl")):
        return True
    first_line = next((line for line in read_lines(path) if line.strip()), b"")
    return first_line.lstrip().startswith((b"{", b"[{"))


def refuse_table(path, remedy):
    """Raise InputError, with this remedy, for a table of questions instead of JSON records."""
    if str(path).removesuffix(".gz").endswith(TABLE_ENDINGS) and not holds_json(path):
        raise InputError(f"{path}: a table of questions, but JSON records are needed; {remedy}")


# ---------------------------------------------------------------- queries of qrels

def require_ids(questions, needed_by, log):
    """Raise InputError if only some Questions have ids, or a field of unknown name may hold them.

    needed_by: the flag that matches questions by their ids. If no question has an id, log that
    positions are used.
    """
    without = [question for question in questions if not question.has_id]
    if not without:
        note_ids(questions[0], log)
        return
    first = without[0]
    unknown = list_unknown(first.record, QUESTION_NAMES, ANSWER_NAMES, TITLE_NAMES, POSITIVE_NAMES,
                           HARD_NEGATIVE_NAMES, OTHER_NEGATIVE_NAMES, CONTEXT_NAMES,
                           OTHER_FIELD_NAMES)
    unknown = [name for name in unknown
               if may_hold_ids([question.record.get(name) for question in questions])]
    if unknown or len(without) < len(questions):
        raise InputError(f"{first.location}: {needed_by} needs the questions' ids, and no field of "
                         "this record is known to hold its id; its fields are "
                         f"{shorten(sorted(first.record))}; rename the field with the id to 'id', "
                         "or add one")
    log("note: the questions have no ids; their positions, from 0, are used")


def note_ids(question, log):
    """Log which field is used as the id, if a question has several that differ."""
    given = drop_missing(question.record)
    names = [name for name in given if find_name([name], QUESTION_ID_NAMES)]
    if len({str(given[name]) for name in names}) > 1:
        used = find_name(given, QUESTION_ID_NAMES)
        others = ", ".join(f"'{name}'" for name in names if name != used)
        log(f"note: {question.location}: '{used}' is the question's id; {others} is not used")


def read_unique_questions(paths, task=""):
    """Return {id: Question} of files of questions that qrels refer to by id.

    Raises InputError for a question without an id, or an id with two texts.
    """
    questions = {}
    for path in paths:
        for question in read_questions(path, task):
            if not question.has_id:
                raise InputError(f"{question.location}: a query of the qrels needs an id; its "
                                 f"fields are {shorten(sorted(question.record))}; rename the field "
                                 "with the id to 'id', or add one")
            first = questions.setdefault(question.id, question)
            if first.text != question.text:
                raise InputError(f"{question.location}: the id {shorten(question.id)} belongs to "
                                 "another query, too; make ids unique")
    return questions


def read_queries(paths):
    """Return {id: text} of the files' questions (read_unique_questions)."""
    return {question.id: question.text for question in read_unique_questions(paths).values()}
