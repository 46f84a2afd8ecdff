"""Templates for the texts of documents and queries, and the instructions that retrievers expect
before them.
"""
from collections import defaultdict
from string import Formatter

from records.names import TEXT_NAMES, find_name
from utils import InputError, first_line, shorten

# {version: {task: (before a query, before a key)}}; the task "" stands for all other tasks
INSTRUCTIONS = {
    "none": {},
    "bge": {"": ("Represent this sentence for searching relevant passages: ", "")},
    "bge-zh": {"": ("为这个句子生成表示以用于检索相关文章：", "")},
    "e5": {"": ("query: ", "passage: ")},
    "llm-embedder": {
        "qa": ("Represent this query for retrieving relevant documents: ",
               "Represent this document for retrieval: "),
        "convsearch": ("Encode this query and context for searching relevant passages: ",
                       "Encode this passage for retrieval: "),
        "chat": ("Embed this dialogue to find useful historical dialogues: ",
                 "Embed this historical dialogue for retrieval: "),
        "lrlm": ("Embed this text chunk for finding useful historical chunks: ",
                 "Embed this historical text chunk for retrieval: "),
        "icl": ("Convert this example into vector to look for useful examples: ",
                "Convert this example into vector for retrieval: "),
        "tool": ("Transform this user request for fetching helpful tool descriptions: ",
                 "Transform this tool description for retrieval: "),
    },
}

SIZES = ("small", "base", "large")
# Hub names of the models trained with each version. Relatives are left out on purpose: bge-m3,
# bge-reranker-*, bge-en-icl, e5-mistral-7b-instruct and multilingual-e5-large-instruct were trained
# without instructions or with other ones.
MODELS = {
    "bge": [f"baai/bge-{size}-en{suffix}" for size in SIZES for suffix in ("", "-v1.5")],
    "bge-zh": [f"baai/bge-{size}-zh{suffix}" for size in SIZES for suffix in ("", "-v1.5")],
    "e5": [f"intfloat/{name}" for size in SIZES
           for name in (f"e5-{size}", f"e5-{size}-v2", f"multilingual-e5-{size}")],
    "llm-embedder": ["baai/llm-embedder"],
}


def named_version(name):
    """Return the version that a model was trained with, by its name; "none" for an unknown model.

    name: a hub name, a folder named like the model, or a folder of the hub's cache
    (models--BAAI--bge-base-en/...).
    """
    parts = name.rstrip("/").lower().split("/")
    hub_folders = [part for part in parts if part.startswith("models--")]
    model = hub_folders[0].removeprefix("models--").replace("--", "/") if hub_folders else parts[-1]
    for version, models in MODELS.items():
        if model in models or model in [known.split("/")[1] for known in models]:
            return version
    return "none"


def format_key(key, template, location):
    """Return the text of a key: the key if it is a text, else the template filled with its columns.

    Raises InputError with the location if the key does not fit the template.
    """
    if isinstance(key, str):
        return key
    if not isinstance(key, dict):
        raise InputError(f"{location}: a key or document must be a text or an object with columns, "
                         f"got {shorten(key)}")
    columns = {"title": ""}
    for name, value in key.items():
        columns[name] = "" if value is None else value
    try:
        return template.format_map(columns).strip()
    except KeyError as error:
        reason = f"no column {error}"
    except (IndexError, AttributeError, TypeError, ValueError) as error:
        reason = first_line(error)
    message = (f"{location}: {reason} for --key_template '{template}'; its columns are "
               f"{shorten(sorted(key))}")
    other = find_name(key, TEXT_NAMES)
    if other:
        message += f"; for '{other}', give --key_template '{{title}} {{{other}}}'"
    raise InputError(message)


def check_templates(query_template, key_template):
    """Raise InputError for a --key_template or --query_template that cannot be used."""
    check_template("key_template", key_template, defaultdict(str))
    check_template("query_template", query_template, {"query": ""})


def check_template(flag, template, columns):
    """Raise InputError for a template without a column, or with columns other than these."""
    try:
        template.format_map(columns)
        if not any(column for _, column, _, _ in Formatter().parse(template)):
            raise ValueError("it names no column")
    except (ValueError, IndexError, AttributeError, KeyError) as error:
        raise InputError(f"--{flag} '{template}' cannot be used ({error}); name columns in braces, "
                         "as in '{title} {text}' for keys and '{query}' for queries") from None
