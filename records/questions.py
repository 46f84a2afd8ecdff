"""Questions and their fields, in every file form of the field: one rule for reader and retriever.

A record is a JSON object per question: `question` (or `query`, or BEIR's `text`), an id, `answers`
(or `answer`), `target`, `ctxs` (ranked passages {title, text, score}), `passage` (ground truth) and
`chat_history` (earlier turns). Files: a `.json` list or `.jsonl`; tables whose header names the
columns, or without one of question and answers (DPR's nq-test.csv) or of id and text;
any of them gzipped.
"""
import ast
import csv
import io
import json
import os
import re
import tokenize
import unicodedata
from typing import NamedTuple

from records.files import (
    check_quotes,
    choose_delimiter,
    decode_line,
    iterate_json,
    name_cells,
    read_cells,
    read_json,
    read_lines,
    to_number,
)
from records.names import (
    ANSWERS,
    CONTEXTS,
    DOCUMENT_IDS,
    HARD_NEGATIVES,
    OTHER_FIELDS,
    OTHER_NEGATIVES,
    POSITIVES,
    QUESTION_IDS,
    QUESTIONS,
    TITLES,
    find_name,
    find_value,
    fold,
    list_unknown,
    may_hold_ids,
    spell_id,
)
from utils import InputError, log_on_main, shorten

TABLE_ENDINGS = (".csv", ".tsv", ".txt")
KEY_FOLDS = {fold(name) for name in (*POSITIVES, *HARD_NEGATIVES, *OTHER_NEGATIVES)}
LIST_FIELDS = ("pos", "neg", "pos_index", "neg_index", "positive_ctxs", "negative_ctxs",
               "hard_negative_ctxs")
UNKNOWN_VALUE = "<unk>"  # the answers of TriviaQA's test set are not published
NUMPY_ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=\S+)?\)", re.DOTALL)
NO_COMMA = re.compile(r"""['"]\s+['"]""")  # between two texts of a list


# ---------------------------------------------------------------- fields of a record

def question_text(record, location):
    """Return the question's text. Raise InputError for a record that is no object or has none."""
    if not isinstance(record, dict):
        raise InputError(f"{location}: a record must be a JSON object, this is a "
                         f"{type(record).__name__}")
    text = find_value(record, QUESTIONS)
    if text is not None and not isinstance(text, str):
        name = next(name for name in record if record[name] is text)
        raise InputError(f"{location}: '{name}' must be a text, it is {shorten(text)} "
                         f"({type(text).__name__}); put it in quotes if it is the question")
    if text is None or not text.strip():
        raise InputError(f"{location}: no 'question' (or 'query', 'text') text; its fields are "
                         f"{shorten(sorted(record))}")
    return text


def record_id(record, location):
    """Return the identifier that a record carries, or None. Raise InputError for a wrong type."""
    identifier = find_value(record, QUESTION_IDS)
    if identifier is not None and type(identifier) not in (str, int, float):
        raise InputError(f"{location}: the id must be a text or a number, it is "
                         f"{shorten(identifier)}")
    return identifier


def gold_answers(record, location):
    """Return (answers, target or None) of a record's answers, without those that hold no text.

    They are a list of texts, one text (`answer`, `response`), TriviaQA's object or SQuAD's. Raise
    InputError for anything else.
    """
    name, target = find_name(drop_missing(record), ANSWERS), None
    answers = record[name] if name else []
    if isinstance(answers, dict):
        answers, target = read_answer_object(answers)
    if isinstance(answers, str) and is_list_text(answers):
        try:
            answers = parse_answers(answers, location)  # pyserini and pandas write a list's text
        except InputError:
            if fold(name).endswith("s"):
                raise
    if name is not None and not fold(name).endswith("s"):  # one answer
        if isinstance(answers, str):
            answers = [answers]
        elif not isinstance(answers, (list, dict)) or name == "response":
            answers = []  # a number or true is the index of a choice, no text to look for
    if not isinstance(answers, list) or not all(isinstance(item, str) for item in answers):
        raise InputError(f"{location}: 'answers' must be a list of strings (or 'answer' one, or "
                         f"TriviaQA's object), it is {shorten(answers)}")
    for answer in answers:
        if answer.startswith(("{'", '{"')) and answer.endswith("}"):
            raise InputError(f"{location}: the answer {shorten(answer)} is the text of an object "
                             "(SQuAD's or TriviaQA's, written to a csv); write the answers as a "
                             "list, ['one', 'another']")
    return [answer for answer in answers if has_text(answer)], target


def read_answer_object(answer):
    """Return (answers, target or None) of TriviaQA's object, SQuAD's {text: [text]}, or any other
    object as it is.

    The value and every alias of TriviaQA's are right; where it has no aliases, its normalised ones
    are. The target is the value, in title case if it is all upper case (FiD, src/preprocess.py).
    The value of its test set, <unk>, is no answer.
    """
    if isinstance(find_value(answer, ("text",)), list):
        return find_value(answer, ("text",)), None
    value, aliases = find_value(answer, ("Value",)), find_value(answer, ("Aliases",))
    if not isinstance(value, str) or not isinstance(aliases, (list, type(None))):
        return answer, None
    aliases = [alias for alias in aliases or [] if isinstance(alias, str)]
    normalised = find_value(answer, ("NormalizedAliases",)) or []
    if value == UNKNOWN_VALUE or not has_text(value):
        return aliases or normalised, None
    target = value.title() if value.isupper() else value
    if value.lower() in [alias.lower() for alias in aliases]:
        return aliases, target
    others = aliases or [alias for alias in normalised if alias != value.lower()]
    return [value, *others], target


def drop_missing(record):
    """Return the fields of a record that are not None."""
    return {name: value for name, value in record.items() if value is not None}


def has_text(text):
    """Return True for a text with a character that is neither white space nor a control character.
    """
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def list_field(record, name, location):
    """The list of a field, [] where the record has none. Raises InputError for anything else."""
    items = record.get(name)
    if items is not None and not isinstance(items, list):
        raise InputError(f"{location}: '{name}' must be a list, it is {shorten(items)}")
    return items or []


def is_context(item):
    """True for a passage: an object with a text and, if any, a title that is one."""
    return (isinstance(item, dict) and isinstance(item.get("text"), str)
            and isinstance(item.get("title", ""), (str, type(None))))


def is_index(item):
    """True for a document's index, or one spelled as a text."""
    return type(item) in (int, str)


def is_key(item):
    """True for a text, or an object for the key template."""
    return isinstance(item, (str, dict))


def check_types(record, location, names=LIST_FIELDS):
    """Raise InputError for a record whose fields of these names are no lists of what they should
    hold (passages, indices, or else keys), or whose task is no text.
    """
    for name in names:
        if name.endswith("ctxs"):
            is_right = is_context
            kind = "an object with a 'text' string and, if any, a 'title' string"
        elif name.endswith("_index"):
            is_right, kind = is_index, "the index of a document"
        else:
            is_right, kind = is_key, "a text or an object"
        if name in ("pos", "neg") and isinstance(record.get(name), str):
            continue  # one text
        for item in list_field(record, name, location):
            if not is_right(item):
                raise InputError(f"{location}: every entry of '{name}' must be {kind}, one is "
                                 f"{shorten(item)}")
    if names is LIST_FIELDS:
        check_keys(record, location)
    if not isinstance(record.get("task", ""), (str, type(None))):
        raise InputError(f"{location}: 'task' must be a text such as 'qa', it is "
                         f"{shorten(record['task'])}")


def check_keys(record, location):
    """Raise InputError for positives and negatives, by any of their names, that are no keys."""
    for name in record:
        if name in LIST_FIELDS or fold(name) not in KEY_FOLDS:
            continue
        items = record[name] if isinstance(record[name], list) else []
        for item in items:
            if not is_key(item):
                raise InputError(f"{location}: every entry of '{name}' must be a text or an "
                                 f"object, one is {shorten(item)}")


def labelled_keys(record):
    """Return (positives, negatives) of a record, which its teacher_scores belong to in this order.

    Of DPR's form they are the first of positive_ctxs, and the hard_negative_ctxs or else the
    negative_ctxs. All of a `history` (LLM-Embedder's chat and lrlm) is negative: the teacher will
    choose the positive. Other records have pos and neg, or the names that names.py has for them.
    """
    if record.get("positive_ctxs") is not None:
        negatives = record.get("hard_negative_ctxs") or record.get("negative_ctxs")
        return record["positive_ctxs"][:1], negatives or []
    if record.get("history") is not None:
        return [], record["history"]
    negatives = find_keys(record, HARD_NEGATIVES) or find_numbered_keys(record, "negative")
    return find_keys(record, POSITIVES), negatives or find_keys(record, OTHER_NEGATIVES)


def find_keys(record, names):
    """Return the keys of the first of these fields that holds some; a text is one key."""
    by_fold = {fold(field): value for field, value in record.items()}
    for name in names:
        value = record.get(name) or by_fold.get(fold(name))
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value:
            return value
    return []


def find_numbered_keys(record, name):
    """Return the texts of NAME_1, NAME_2 ..., as sentence-transformers has several negatives."""
    values = []
    for number in range(1, len(record) + 1):
        value = find_value(record, [f"{name}_{number}"])
        if not isinstance(value, str):
            break
        values.append(value)
    return values


def has_keys(record):
    """Return True for a record with keys to train on or to rank."""
    if record.get("positive_ctxs") or record.get("history"):
        return True
    negatives = [name for name in HARD_NEGATIVES if not name.endswith("_ctxs")]
    return bool(find_keys(record, POSITIVES) or find_keys(record, negatives))


def gold_passages(record, location=""):
    """The ground-truth passages [{text, title and id where given}] of `passage` (a text, such an
    object, or a list of them) or of LocalRQA's `gold_docs`; [] where both are missing or empty.

    Raises InputError for anything else.
    """
    name = "passage" if record.get("passage") else "gold_docs"
    items = record.get(name) or []
    passages = []
    for item in items if isinstance(items, list) else [items]:
        if isinstance(item, str):
            item = {"text": item}
        elif isinstance(item, dict) and "page_content" in item:
            metadata = item.get("metadata")
            title = metadata.get("title") if isinstance(metadata, dict) else None
            item = {"title": title, "text": item["page_content"]}
        if not is_context(item):
            raise InputError(f"{location}: '{name}' must be a text, an object with a 'text' string "
                             "and, if any, a 'title' string, or a list of them, it is "
                             f"{shorten(items)}")
        passages.append(item)
    return passages


def history_turns(record, location=""):
    """The texts of the turns of `chat_history`, the oldest first: of a list of texts or of objects
    {role, content} or {speaker, message}, or the lines of a text; [] where it is missing or empty.

    Raises InputError for anything else.
    """
    history = record.get("chat_history") or []
    turns = history.split("\n") if isinstance(history, str) else history
    texts = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if isinstance(turn, dict):
            speaker = turn.get("role") or turn.get("speaker")
            turn = turn.get("content") or turn.get("message")
            if speaker and isinstance(turn, str):
                turn = f"{speaker}: {turn}"
        if not isinstance(turn, str):
            raise InputError(f"{location}: 'chat_history' must be a text, or a list of texts or of "
                             f"objects {{role, content}}, it is {shorten(history)}")
        if turn.strip():
            texts.append(turn.strip())
    return texts


# ---------------------------------------------------------------- records for the reader

def read_records(path, keep_contexts=None, log=log_on_main):
    """Return the records of a file, checked, their contexts in the reader's order.

    Every record gets `question`, `answers` (may be empty), `ctxs` and `id`; other fields are kept.
    Contexts are sorted by descending score, ties in file order, if the file's first context has one
    (FiD, src/data.py: sort_data); those without a score come last then. `keep_contexts` drops the
    contexts after that many, to save memory. Logs a warning where all scores rise. Raises
    InputError.
    """
    refuse_table(path, "run retrieve.py first, whose --output FILE.jsonl has contexts")
    records, first_context, orders = [], None, []
    for index, (item, location) in enumerate(iterate_json(path)):
        record = check_record(item, location, index)
        if record["ctxs"] and first_context is None:
            first_context = record["ctxs"][0]
        if record["ctxs"] and "score" in first_context:
            orders.append(rank_order([context_score(context) for context in record["ctxs"]
                                      if "retrieval_score" not in context]))
            record["ctxs"].sort(key=context_score, reverse=True)
        record["ctxs"] = record["ctxs"][:keep_contexts]
        records.append(record)
    if not records:
        raise InputError(f"{path}: holds no records")
    note_rising(orders, path, log)
    return records


def rank_order(scores):
    """Return "rising" for scores in that order, "other" for others, and None where fewer than
    three differ.
    """
    if len(set(scores)) < 3:
        return None
    return "rising" if scores == sorted(scores) else "other"


def note_rising(orders, path, log):
    """Log a warning if the scores of all questions, of these rank_orders, rise: what was found
    first then has the lowest, as distances have.
    """
    if set(orders) - {None} == {"rising"} and orders.count("rising") > 1:
        log(f"warning: {path}: the scores of every question rise, as distances do, but the highest "
            "counts as the best; if they are distances, negate them")


def context_score(context):
    """Return a context's score as a number, -inf for one without."""
    score = context.get("score")
    return float("-inf") if score is None else to_number(score)


def retrieval_score(context):
    """Return the score that a retriever gave a context, or None.

    test.py --scores keeps it as `retrieval_score`, where the reader's takes its place as `score`.
    """
    return context.get("retrieval_score" if "retrieval_score" in context else "score")


def check_record(record, location, index):
    """Return a copy of the record with the fields that the reader uses; `index` is its id if it has
    none.

    Raises InputError.
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
        raise InputError(f"{location}: 'target' must be a text, it is {shorten(record['target'])}")
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
    """Raise InputError for a context whose score of this name is given and is no number."""
    try:
        if context.get(name) is not None:
            to_number(context[name])
    except ValueError:
        raise InputError(f"{location}: a context's {name} {shorten(context[name])} is not a "
                         "number") from None


def take_contexts(record):
    """Make contexts of another name (names.CONTEXTS) the record's `ctxs`, and their ids `id`."""
    name = find_name(record, CONTEXTS)
    if record.get("ctxs") is None and name is not None:
        contexts = record[name]
        if isinstance(contexts, list) and all(map(is_context, contexts)):
            record["ctxs"] = record.pop(name)
    if isinstance(record.get("ctxs"), list):
        record["ctxs"] = [name_id(context) for context in record["ctxs"]]


def name_id(context):
    """Return a context whose id is called `id`, whatever name it had."""
    if not isinstance(context, dict) or context.get("id") is not None:
        return context
    identifier = find_value(context, DOCUMENT_IDS)
    return context if identifier is None else {"id": identifier} | context


def note_contexts(records, path, num_contexts, log):
    """Logs a line if records of a file have no contexts, so that their questions are read alone, or
    none has as many as are to be read.
    """
    most = max((len(record["ctxs"]) for record in records), default=0)
    if 0 < most < num_contexts:
        log(f"note: no record of {path} has more than {most} contexts, fewer than --num_contexts "
            f"{num_contexts}")
    without = sum(not record["ctxs"] for record in records)
    if without == len(records):
        log(f"warning: 0 of {len(records)} records of {path} have contexts: run retrieve.py first, "
            "else each question is read alone")
    elif without:
        log(f"note: {without} of {len(records)} records of {path} have no contexts")


def note_unscored(records, path, log):
    """Log how many records of a file have no answers, so that no measure counts them."""
    unscored = sum(not record["answers"] for record in records)
    if unscored and unscored == len(records):
        log(f"note: no record of {path} has answers: nothing is measured on it; test.py OUT {path} "
            "--pred FILE writes what the reader answers")
    elif unscored:
        log(f"note: {unscored} of {len(records)} records of {path} have no answers: they are not "
            "scored")


def note_files(files, num_contexts, log):
    """note_contexts of each [(path, records or None)], the first being of training; logs a line
    for another that is the same file.
    """
    training_path, _ = files[0]
    for index, (path, records) in enumerate(files):
        if records is None:
            continue
        if index > 0 and os.path.samefile(path, training_path):
            log(f"note: {path} is also the training file: its measures do not show how new "
                "questions are answered")
        else:
            note_contexts(records, path, num_contexts, log)


# ---------------------------------------------------------------- questions for retrieval

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


# ---------------------------------------------------------------- tables of questions

def read_table(path):
    """[(record, 'FILE:LINE')] of a table, whose first line with text may be a header.

    Raises InputError.
    """
    lines = decode_lines(path)
    first_line = next((index for index, line in enumerate(lines) if line.strip()), None)
    if first_line is None:
        return []
    location = f"{path}:{first_line + 1}"
    names, separator = split_header(lines[first_line], location)
    if names:
        return read_named_columns(path, lines, names, separator)
    rows = []
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{path}:{line_number}"
            rows.append((parse_two_columns(line, path, location), location))
    return rows


def decode_lines(path):
    """The lines of a table, without their ends.

    Raises InputError for a line that is not in UTF-8 or holds a carriage return, at which some
    programs end a line and others do not.
    """
    lines = []
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number)
        if "\r" in text:
            raise InputError(f"{path}:{line_number}: a carriage return inside the line; end lines "
                             "with line feeds: tr '\\r' '\\n'")
        lines.append(text)
    return lines


def split_line(line, separator, location):
    """The cells of a line, which need not be quoted as csv does. Raises InputError."""
    try:
        return next(read_cells([line], separator), [])
    except csv.Error as error:
        raise InputError(f"{location}: cannot be split into cells ({error})") from None


def split_header(line, location):
    """Return (column names, the separator) of a table's first line, names being None if it is no
    header.

    A header names a question, and an id or answers unless it is the only column. Raises InputError
    for one that names no question, or a column twice.
    """
    separator = choose_delimiter(line)
    names = [cell.strip().lower() for cell in split_line(line, separator, location)]
    if len(names) > 1 and names[0].isdecimal():
        return None, separator  # an id: no column is named by a number
    has_question = find_name(names, QUESTIONS) is not None
    has_others = find_name(names, (*QUESTION_IDS, *DOCUMENT_IDS, *ANSWERS)) is not None
    if has_others and not has_question:
        raise InputError(f"{location}: the header names no column 'question' (or 'query', 'text'); "
                         "rename the one that holds the questions")
    if not has_question or len(names) > 1 and not has_others:
        return None, separator
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{location}: the header names {repeated!r} twice; rename one of them")
    return names, separator


def read_named_columns(path, lines, names, separator):
    """[(record, 'FILE:LINE')] of the lines of a table with a header; a quoted cell may hold line
    ends.

    Raises InputError.
    """
    reader = read_cells((line + "\n" for line in lines), separator, strict=True)
    rows = []
    while True:
        location = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error:
            raise InputError(f"{location}: a cell begins with a quote and is not closed as csv has "
                             'it; double the quotes inside it, as in "a ""b"" c"') from None
        if cells is None:
            return rows[1:]  # the first is the header
        if not any(cell.strip() for cell in cells):
            continue
        row = name_cells(cells, names, location)
        check_quotes(cells, separator, location)
        rows.append((make_record(row, location), location))


def make_record(row, location):
    """Return the record of {column: cell}, without the empty ones: `id`, `answers` as a list, the
    others as they are named.

    Raises InputError.
    """
    record = {name: cell.strip() for name, cell in row.items() if name and cell.strip()}
    identifier = find_value(record, QUESTION_IDS)
    if identifier is not None:
        record["id"] = identifier
    answers = find_value(record, ANSWERS)
    record.pop("answer", None)
    if answers is not None:
        is_list = answers.startswith("[") or NUMPY_ARRAY.fullmatch(answers)
        record["answers"] = parse_answers(answers, location) if is_list else [answers]
    return record


def parse_two_columns(line, path, location):
    """Return the record of a line without a header: question and answers, or id and text.

    A second column that is a list holds answers, as in DPR's files, whose cells are quoted as csv
    does. Any other line is an id and, as it stands after the first tab, a text; so is one that
    begins with a number, or with a word before brackets that are no list. Raises InputError.
    """
    if "\t" not in line:
        raise InputError(f"{location}: neither a header, such as question,answer, nor question and "
                         f"answers with a tab between them: {shorten(line)}")
    cells = split_line(line, "\t", location)
    identifier, _, question = line.partition("\t")
    if len(cells) == 2 and holds_answers(cells[1], path) and not identifier.strip().isdecimal():
        try:
            return {"question": cells[0], "answers": parse_answers(cells[1], location)}
        except InputError:
            if len(identifier.split()) != 1 or cells[1].startswith(("['", '["')):
                raise
    if len(identifier.split()) != 1:
        raise InputError(f"{location}: the first of two columns is an id, and "
                         f"{shorten(identifier)} is none; if it is a question, add the header line "
                         "question<TAB>answer")
    return {"id": identifier, "question": question}


def holds_answers(cell, path):
    """True for a second column that is meant as a list of answers, not as a text."""
    is_csv = str(path).removesuffix(".gz").endswith(".csv")  # DPR's, where a list may be cut off
    return cell.startswith("[") and (cell.endswith("]") or is_csv)


def is_list_text(text):
    """Return True for a text that looks like a list, or like numpy's array."""
    return (text.startswith("[") and text.endswith("]")) or bool(NUMPY_ARRAY.fullmatch(text))


def parse_answers(text, location):
    """Return the answers that a list spells, in JSON, in Python (DPR's files) or in numpy's form.

    Raise InputError for anything else.
    """
    for parse in (json.loads, parse_python_list):
        try:
            answers = parse(text)
            # both spell halves of characters, which no file can hold
            json.dumps(answers, ensure_ascii=False).encode()
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(answers, list) and all(isinstance(item, (str, int, float))
                                             for item in answers):
            return [str(answer) for answer in answers]
    raise InputError(f"{location}: {shorten(text)} is not a list of answers; write it as "
                     "['one', 'another']")


def parse_python_list(text):
    """Return what a Python expression spells; texts without a comma between them are several.

    pandas and datasets write lists of texts to a csv as numpy prints them, ['a' 'b'], which Python
    would read as the one text 'ab'. Raise SyntaxError or ValueError.
    """
    array = NUMPY_ARRAY.fullmatch(text)
    text = array[1] if array else text
    answers = ast.literal_eval(text)
    if not NO_COMMA.search(text):
        return answers
    texts = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.STRING]
    return [ast.literal_eval(item) for item in texts] if isinstance(answers, list) else answers


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
    unknown = list_unknown(first.record, QUESTIONS, ANSWERS, TITLES, POSITIVES, HARD_NEGATIVES,
                           OTHER_NEGATIVES, CONTEXTS, OTHER_FIELDS)
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
    names = [name for name in given if find_name([name], QUESTION_IDS)]
    if len({str(given[name]) for name in names}) > 1:
        used = find_name(given, QUESTION_IDS)
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
