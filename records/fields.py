"""Read and check the fields of a record: question, id, answers, keys, passages, earlier turns."""
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
    find_name,
    find_value,
    fold,
)
from utils import InputError, shorten

KEY_FOLDS = {fold(name) for name in (*POSITIVE_NAMES, *HARD_NEGATIVE_NAMES, *OTHER_NEGATIVE_NAMES)}
LIST_FIELDS = ("pos", "neg", "pos_index", "neg_index", "positive_ctxs", "negative_ctxs",
               "hard_negative_ctxs")


UNKNOWN_VALUE = "<unk>"  # the answers of TriviaQA's test set are not published
NUMPY_ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=\S+)?\)", re.DOTALL)
NO_COMMA = re.compile(r"""['"]\s+['"]""")  # between two texts of a list


def question_text(record, location):
    """Return the question's text. Raise InputError for a record that is no object or has none."""
    if not isinstance(record, dict):
        raise InputError(f"{location}: a record must be a JSON object, this is a "
                         f"{type(record).__name__}")
    text = find_value(record, QUESTION_NAMES)
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
    identifier = find_value(record, QUESTION_ID_NAMES)
    if identifier is not None and type(identifier) not in (str, int, float):
        raise InputError(f"{location}: the id must be a text or a number, it is "
                         f"{shorten(identifier)}")
    return identifier


def gold_answers(record, location):
    """Return (answers, target or None) of a record's answers, without those that hold no text.

    They are a list of texts, one text (`answer`, `response`), TriviaQA's object or SQuAD's. Raise
    InputError for anything else.
    """
    name, target = find_name(drop_missing(record), ANSWER_NAMES), None
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
    negatives = find_keys(record, HARD_NEGATIVE_NAMES) or find_numbered_keys(record, "negative")
    return find_keys(record, POSITIVE_NAMES), negatives or find_keys(record, OTHER_NEGATIVE_NAMES)


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
    negatives = [name for name in HARD_NEGATIVE_NAMES if not name.endswith("_ctxs")]
    return bool(find_keys(record, POSITIVE_NAMES) or find_keys(record, negatives))


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
