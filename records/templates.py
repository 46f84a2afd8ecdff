"""The instructions that retrievers expect before their texts, by the models that were trained with
them.
"""
# {version: {task: (before a query, before a key)}}; the task "" stands for every task that is not
# named
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
# The hub names of the models that were trained with a version. Their relatives are not: bge-m3,
# bge-reranker-*, bge-en-icl, e5-mistral-7b-instruct or multilingual-e5-large-instruct were trained
# with none, or with one of another form.
MODELS = {
    "bge": [f"baai/bge-{size}-en{suffix}" for size in SIZES for suffix in ("", "-v1.5")],
    "bge-zh": [f"baai/bge-{size}-zh{suffix}" for size in SIZES for suffix in ("", "-v1.5")],
    "e5": [f"intfloat/{name}" for size in SIZES
           for name in (f"e5-{size}", f"e5-{size}-v2", f"multilingual-e5-{size}")],
    "llm-embedder": ["baai/llm-embedder"],
}


def named_version(name):
    """Return the version that a model is known to be trained with, "none" for any other model.

    `name` is a hub name, a folder named like the model, or the folder in which the hub keeps it
    (models--BAAI--bge-base-en/...).
    """
    parts = name.rstrip("/").lower().split("/")
    hub_folders = [part for part in parts if part.startswith("models--")]
    model = hub_folders[0].removeprefix("models--").replace("--", "/") if hub_folders else parts[-1]
    for version, models in MODELS.items():
        if model in models or model in [known.split("/")[1] for known in models]:
            return version
    return "none"
