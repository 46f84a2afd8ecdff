"""The instructions that retrievers expect before their texts, by the model that was trained with
them.
"""
import re

# {version: {task: (before a query, before a key)}}; the task "" stands for every task that is not
# named
INSTRUCTIONS = {
    "none": {},
    "bge": {"": ("Represent this sentence for searching relevant passages: ", "")},
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

# bge-m3 and e5-mistral were trained without the instructions of their namesakes
NAMED_VERSION = re.compile(r"(?:^|[-_.])(llm-embedder|bge|e5)(?![a-z0-9]|-m3|-mistral)")


def named_version(name):
    """The version that a model's name tells, "none" if it tells none.

    `name` is a hub name or a folder, also the one in which the hub keeps a model
    (models--BAAI--bge-base-en/...).
    """
    parts = name.rstrip("/").lower().split("/")
    hub_folders = [part for part in parts if part.startswith("models--")]
    model_name = hub_folders[0] if hub_folders else parts[-1]
    match = NAMED_VERSION.search(model_name)
    return match[1] if match else "none"
