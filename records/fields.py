"""Read and check the fields of a record: question, id, answers, keys, passages, earlier turns.

A record is the JSON object of one question: `question` (or `query`, or BEIR's `text`), an id,
`answers` (or `answer`), `target`, `ctxs` (ranked passages {title, text, score}), `passage` (ground
truth) and `chat_history` (earlier turns). docs/formats.md has all fields.
"""
import ast
import io
import json
import re
import tokenize
import unicodedata

from records.names import (
    ANSWER_NAMES,
    HARD_NEGATIVE_NAMES,
    OTHER_NEGATIVE_NAMES,
    POSITIVE_NAMES,
    QUESTION_ID_NAMES,
    QUESTION_NAMES,
    drop_missing,
    find_name,
    find_value,
    fold,
)
from utils import InputError, shorten

KEY_FOLDS = {fold(name) for name in (*POSITIVE_NAMES, *HARD_NEGATIVE_NAMES, *OTHER_NEGATIVE_NAMES)}
LIST_FIELDS = ("pos", "neg", "pos_index", "neg_index", "positive_ctxs", "negative_ctxs",
               "hard_negative_ctxs")
UNKNOWN_VALUE = "<unk>"  # TriviaQA's test set has only this answer; the real ones are unpublished
NUMPY_ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=\S+)?\)", re.DOTALL)
NO_COMMA = re.compile(r"""['"]\s+['"]""")  # two texts of a list without a comma between them


def question_text(record, location):
    """Return the question's text.

    Raises InputError if the record is not an object or has no question.
    """
    if not isinstance(record, dict):
        raise InputError(f"{location}: a record must be a JSON object, got a "
                         f"{type(record).__name__}")
    text = find_value(record, QUESTION_NAMES)
    if text is not None and not isinstance(text, str):
        name = next(name for name in record if record[name] is text)
        raise InputError(f"{location}: '{name}' must be a text, got {shorten(text)} "
                         f"({type(text).__name__}); put it in quotes if it is the question")
    if text is None or not text.strip():
        raise InputError(f"{location}: no 'question' (or 'query', 'text') text; its fields are "
                         f"{shorten(sorted(record))}")
    return text


def record_id(record, location):
    """Return a record's id as it is in the file, or None. Raises InputError for a wrong type."""
    identifier = find_value(record, QUESTION_ID_NAMES)
    if identifier is not None and type(identifier) not in (str, int, float):
        raise InputError(f"{location}: the id must be a text or a number, got "
                         f"{shorten(identifier)}")
    return identifier


def gold_answers(record, location):
    """Return a record's (answers, target or None); answers without text are dropped.

    The field holds a list of texts, one text (`answer`, `response`), TriviaQA's object or SQuAD's.
    Raises InputError for anything else.
    """
    name, target = find_name(drop_missing(record), ANSWER_NAMES), None
    answers = record[name] if name else []
    if isinstance(answers, dict):
        answers, target = read_answer_object(answers)
    if isinstance(answers, str) and is_list_text(answers):
        try:
            answers = parse_answers(answers, location)  # pyserini and pandas write a list as text
        except InputError:
            if fold(name).endswith("s"):
                raise
    if name is not None and not fold(name).endswith("s"):  # one answer
        if isinstance(answers, str):
            answers = [answers]
        elif not isinstance(answers, (list, dict)) or name == "response":
            answers = []  # a number or true is the index of a choice, not an answer's text
    if not isinstance(answers, list) or not all(isinstance(item, str) for item in answers):
        raise InputError(f"{location}: 'answers' must be a list of strings (or 'answer' a string, "
                         f"or TriviaQA's object), got {shorten(answers)}")
    for answer in answers:
        if answer.startswith(("{'", '{"')) and answer.endswith("}"):
            raise InputError(f"{location}: the answer {shorten(answer)} is the text of an object "
                             "(SQuAD's or TriviaQA's, saved in a csv); write the answers as a "
                             "list, ['one', 'another']")
    return [answer for answer in answers if has_text(answer)], target


def read_answer_object(answer):
    """Return (answers, target or None) of TriviaQA's object or SQuAD's {text: [text]}.

    Any other object is returned unchanged. TriviaQA's answers are its value and aliases or, if it
    has no aliases, its value and normalised aliases. The target is the value, in title case if it
    is all upper case (FiD, src/preprocess.py). The value <unk> of TriviaQA's test set is not an
    answer.
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


def has_text(text):
    """Return True if a text has a character besides white space and control characters."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def list_field(record, name, location):
    """Return the list in a field, or [] without the field. Raises InputError for another type."""
    items = record.get(name)
    if items is not None and not isinstance(items, list):
        raise InputError(f"{location}: '{name}' must be a list, got {shorten(items)}")
    return items or []


def is_context(item):
    """Return True for a passage: an object whose `text` and, if given, `title` are texts."""
    return (isinstance(item, dict) and isinstance(item.get("text"), str)
            and isinstance(item.get("title", ""), (str, type(None))))


def is_index(item):
    """Return True for a document's index: a number, or a text that spells one."""
    return type(item) in (int, str)


def is_key(item):
    """Return True for a key: a text, or an object for the key template."""
    return isinstance(item, (str, dict))


def check_types(record, location, names=LIST_FIELDS):
    """Check that these fields of a record are lists of passages, indices or keys.

    Raises InputError if they are not, or if the task is not a text.
    """
    for name in names:
        if name.endswith("ctxs"):
            is_right = is_context
            kind = "an object with a 'text' string and optionally a 'title' string"
        elif name.endswith("_index"):
            is_right, kind = is_index, "the index of a document"
        else:
            is_right, kind = is_key, "a text or an object"
        if name in ("pos", "neg") and isinstance(record.get(name), str):
            continue  # a single text is allowed
        for item in list_field(record, name, location):
            if not is_right(item):
                raise InputError(f"{location}: every entry of '{name}' must be {kind}, got "
                                 f"{shorten(item)}")
    if names is LIST_FIELDS:
        check_keys(record, location)
    if not isinstance(record.get("task", ""), (str, type(None))):
        raise InputError(f"{location}: 'task' must be a text such as 'qa', got "
                         f"{shorten(record['task'])}")


def check_keys(record, location):
    """Raise InputError for positives or negatives, under any of their names, that are not keys."""
    for name in record:
        if name in LIST_FIELDS or fold(name) not in KEY_FOLDS:
            continue
        items = record[name] if isinstance(record[name], list) else []
        for item in items:
            if not is_key(item):
                raise InputError(f"{location}: every entry of '{name}' must be a text or an "
                                 f"object, got {shorten(item)}")


def labelled_keys(record):
    """Return (positives, negatives) of a record, in the order of its teacher_scores.

    - DPR's records: the first of positive_ctxs, and hard_negative_ctxs or else negative_ctxs.
    - Records with a `history` (LLM-Embedder's chat and lrlm): all of it is negative, and the
      teacher chooses the positive.
    - Other records: pos and neg, or another of their names in names.py.
    """
    if record.get("positive_ctxs") is not None:
        negatives = record.get("hard_negative_ctxs") or record.get("negative_ctxs")
        return record["positive_ctxs"][:1], negatives or []
    if record.get("history") is not None:
        return [], record["history"]
    negatives = find_keys(record, HARD_NEGATIVE_NAMES) or find_numbered_keys(record, "negative")
    return find_keys(record, POSITIVE_NAMES), negatives or find_keys(record, OTHER_NEGATIVE_NAMES)


def find_keys(record, names):
    """Return the keys in the first of these fields that is not empty; a text is one key."""
    by_fold = {fold(field): value for field, value in record.items()}
    for name in names:
        value = record.get(name) or by_fold.get(fold(name))
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value:
            return value
    return []


def find_numbered_keys(record, name):
    """Return the texts in NAME_1, NAME_2 ..., sentence-transformers' names of several negatives."""
    values = []
    for number in range(1, len(record) + 1):
        value = find_value(record, [f"{name}_{number}"])
        if not isinstance(value, str):
            break
        values.append(value)
    return values


def has_keys(record):
    """Return True if a record has keys to train on or to rank."""
    if record.get("positive_ctxs") or record.get("history"):
        return True
    negatives = [name for name in HARD_NEGATIVE_NAMES if not name.endswith("_ctxs")]
    return bool(find_keys(record, POSITIVE_NAMES) or find_keys(record, negatives))


def gold_passages(record, location=""):
    """Return a record's ground-truth passages, [{text, and title and id if given}].

    `passage` or LocalRQA's `gold_docs` holds a text, such an object, or a list of them. Returns []
    if both are missing or empty; raises InputError for anything else.
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
                             "and optionally a 'title' string, or a list of them, got "
                             f"{shorten(items)}")
        passages.append(item)
    return passages


def history_turns(record, location=""):
    """Return the texts of the turns in `chat_history`, the oldest first.

    The field is a list of texts, a list of objects {role, content} or {speaker, message}, or a text
    with one turn per line. Returns [] if it is missing or empty; raises InputError for anything
    else.
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
                             f"objects {{role, content}}, got {shorten(history)}")
        if turn.strip():
            texts.append(turn.strip())
    return texts


def is_list_text(text):
    """Return True for a text that looks like a list or like numpy's array."""
    return (text.startswith("[") and text.endswith("]")) or bool(NUMPY_ARRAY.fullmatch(text))


def parse_answers(text, location):
    """Return the answers in the text of a list, in JSON's, Python's (DPR) or numpy's notation.

    Raises InputError for anything else.
    """
    for parse in (json.loads, parse_python_list):
        try:
            answers = parse(text)
            # both notations can escape half a character, which no file can hold
            json.dumps(answers, ensure_ascii=False).encode()
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(answers, list) and all(isinstance(item, (str, int, float))
                                             for item in answers):
            return [str(answer) for answer in answers]
    raise InputError(f"{location}: {shorten(text)} is not a list of answers; write it as "
                     "['one', 'another']")


def parse_python_list(text):
    """Return the value of a Python literal, in which commas between texts may be missing.

    pandas and datasets write lists of texts to a csv as numpy prints them, ['a' 'b']. Python would
    read that as one text, 'ab'. Raises SyntaxError or ValueError.
    """
    array = NUMPY_ARRAY.fullmatch(text)
    text = array[1] if array else text
    answers = ast.literal_eval(text)
    if not NO_COMMA.search(text):
        return answers
    texts = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.STRING]
    return [ast.literal_eval(item) for item in texts] if isinstance(answers, list) else answers
