"""How texts become token ids: tokenizers, lengths and prompts, settled once for all scripts.

A setting comes from a flag, else from our args.json, else from the folder's other files, else from
a default.
"""
import os
from dataclasses import dataclass, field

from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from dense.description import Description, find_path, read_descriptions, read_transformer
from records.reading import read_args
from records.templates import INSTRUCTIONS, named_version
from training.checkpoints import find_args, load_tokenizer, read_config
from utils import InputError, shorten

MAX_LENGTH = 256   # tokens of a text if neither a flag nor a file sets it
UNLIMITED = 10 ** 7  # model_max_length is larger in tokenizers without a limit of their own
ROLES = ("query", "key")
TEMPLATES = {"query_template": "{query}", "key_template": "{title} {text}"}


@dataclass(frozen=True)
class TextSettings:
    """Hold the flags that set how texts become vectors; None where a flag is not given.

    The fields are named like the flags of train_dense.py and retrieve.py, see dense/flags.py.
    """
    query_max_length: int | None = None
    key_max_length: int | None = None
    query_prompt: str | None = None
    key_prompt: str | None = None
    add_instruction: bool | None = None
    version: str | None = None
    pooling_method: str | None = None
    dense_metric: str | None = None
    query_template: str = TEMPLATES["query_template"]
    key_template: str = TEMPLATES["key_template"]
    ranker: bool = False

    @property
    def names_instructions(self):
        """Return whether a flag chooses the instructions."""
        return self.version is not None or self.add_instruction is not None

    @property
    def names_prompts(self):
        """Return whether a flag chooses the prompts."""
        return self.query_prompt is not None or self.key_prompt is not None


@dataclass
class Texts:
    """Turn the texts of a retriever or ranker into token ids: the settled form of TextSettings.

    tokenizers    {query, key}; the same tokenizer twice if one encoder serves both
    max_lengths   {query, key: most tokens of a text}
    settings      the TextSettings: templates, and which flags were given
    version       whose instructions are used, a key of INSTRUCTIONS
    add_instruction
                  whether texts of a task get an instruction
    prompts       {query, key} put before every text; None: instructions depend on the task
    instructions  {task: (before a query, before a key)}, see INSTRUCTIONS
    appends_end   append the end token if the tokenizer does not, as early versions of
                  train_dense.py did to train last-token pooling
    skip          {query, key}: tokens of the prompt that the pooling leaves out
    sources       {query, key, prompts, version, pooling, metric: the flag or file that sets it}
    descriptions  {query, key: Description}, empty for a ranker
    """
    tokenizers: dict
    max_lengths: dict = field(default_factory=lambda: dict.fromkeys(ROLES, MAX_LENGTH))
    settings: TextSettings = TextSettings()
    version: str = "none"
    add_instruction: bool = True
    prompts: dict | None = None
    instructions: dict = field(default_factory=dict)
    appends_end: bool = False
    skip: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    descriptions: dict = field(default_factory=dict)

    def instruction(self, task):
        """Return (the text before queries, the text before keys) of a task: the prompts if there
        are any, else the task's instruction, and two empty texts without a task.
        """
        if self.prompts is not None:
            return self.prompts["query"], self.prompts["key"]
        if not task:
            return "", ""
        for_other_tasks = self.instructions.get("", ("", ""))
        return self.instructions.get(task, for_other_tasks)


def settle_texts(name, key_name, settings, log, is_training=False):
    """Return the Texts of a retriever or ranker by its name.

    key_name: the encoder of the keys if it has a folder of its own. Raises InputError.
    """
    if settings.ranker:
        texts = settle_pairs(name, settings)
        settle_version(texts, name, is_training)
        return texts
    descriptions = read_descriptions(name, key_name)
    query, key = descriptions["query"], descriptions["key"]
    tokenizer = open_tokenizer(query, name)
    if not is_training and settings.pooling_method is None:
        check_chat_template(query, tokenizer)
    texts = Texts({"query": tokenizer, "key": tokenizer}, settings=settings,
                  descriptions=descriptions)
    if key.folder != query.folder:
        texts.tokenizers["key"] = open_tokenizer(key, name)
    for role in ROLES:
        settle_length(texts, role, name)
    settle_version(texts, name, is_training)
    settle_prompts(texts, name, log, is_training)
    if texts.prompts is None and texts.add_instruction:
        texts.instructions = INSTRUCTIONS[texts.version]
    for role in ROLES:
        if descriptions[role].skips_prompt:
            texts.skip[role] = count_prompt(texts, role)
    pooling = settings.pooling_method or query.pooling
    texts.appends_end = pooling == "last" and lacked_end(name, tokenizer)
    for setting, flag in (("pooling", "pooling_method"), ("metric", "dense_metric")):
        is_given = getattr(settings, flag) is not None
        texts.sources[setting] = f"--{flag}" if is_given else query.sources.get(setting, "default")
    return texts


def settle_pairs(name, settings):
    """Return the Texts of a ranker, whose query and key share the length of a pair."""
    folder = find_path(name)
    tokenizer = load_tokenizer(folder, folder)
    lengths = {}
    for role in ROLES:
        flag = f"{role}_max_length"
        lengths[role] = getattr(settings, flag) or read_trained_length(name, flag)
    if None in lengths.values():
        description = Description(folder)
        read_transformer(description, task="sequence-classification")
        length = description.lengths.get("query") or find_own_length(tokenizer, folder)
        share_length(lengths, length or 2 * MAX_LENGTH)
    return Texts({"query": tokenizer, "key": tokenizer}, lengths, settings)


def share_length(lengths, total):
    """Fill in the lengths {query, key} that are None, so that a pair has `total` tokens.

    The tokenizer truncates the pair as a whole, so without flags only the sum matters.
    """
    if lengths["query"] is None:
        left = total // 2 if lengths["key"] is None else total - lengths["key"]
        lengths["query"] = max(left, 3)
    if lengths["key"] is None:
        lengths["key"] = max(total - lengths["query"], 3)


# ---------------------------------------------------------------- the flags of the training

def read_trained_flags(name):
    """Return the training flags that a checkpoint's args.json stores, {} without such a file.

    Raises InputError for a template, instruction or length of a wrong type.
    """
    flags = read_args(find_args(name)).get("args", {})
    if not isinstance(flags, dict):
        raise InputError(f"{name}/args.json: 'args' must be an object, got {shorten(flags)}; "
                         "correct it")
    defaults = TEMPLATES | {"query_max_length": MAX_LENGTH, "key_max_length": MAX_LENGTH,
                            "add_instruction": True, "version": "none"}
    for flag, default in defaults.items():
        value = flags.get(flag, default)
        is_unknown = flag == "version" and value not in list(INSTRUCTIONS)
        if type(value) is not type(default) or is_unknown:
            raise InputError(f"{name}/args.json: {flag} cannot be {shorten(value)}; correct it")
    return flags


def read_trained_length(name, flag):
    """Return the length that one of our folders was trained with, or None for another folder.

    Raises InputError.
    """
    path = find_path(name)
    flags = read_args(path).get("args", {})
    length = flags.get(flag) if isinstance(flags, dict) else None
    if length is not None and (type(length) is not int or not 0 < length < UNLIMITED):
        raise InputError(f"{path}/args.json: {flag} {shorten(length)} is not a length; correct it")
    return length


# ---------------------------------------------------------------- tokenizers

def open_tokenizer(description, fallback):
    """Return the tokenizer of an encoder's folder, or of `fallback` if the folder has none. It puts
    texts into lower case if the folder's files set that.

    Raises InputError.
    """
    tokenizer = load_tokenizer(description.folder, fallback)
    if description.lowercases:
        lower_case(tokenizer)
    types = tokenizer("a a").get("token_type_ids") or []
    if any(types):
        raise InputError(f"{description.folder}: its tokenizer gives a single text token types "
                         "other than 0, which is not supported; use another retriever")
    return tokenizer


def check_chat_template(description, tokenizer):
    """Raise InputError for a chat model that has not been made a retriever: sentence-transformers
    would put texts into its chat template.
    """
    is_plain = os.path.isdir(description.folder) and not description.has_modules
    if is_plain and tokenizer.chat_template:
        raise InputError(f"{description.folder}: has a chat template and no modules.json, so its "
                         "pooling is not known; give a retriever, or --pooling_method to read "
                         "texts without the template")


def lower_case(tokenizer):
    """Put texts into lower case before the tokenizer's own normalisation, as
    sentence-transformers' do_lower_case does.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path}: do_lower_case with a tokenizer in Python is "
                         "not supported; save it as tokenizer.json")
    backend = tokenizer.backend_tokenizer
    normalizers = [] if backend.normalizer is None else [backend.normalizer]
    if isinstance(backend.normalizer, Normalizers):
        normalizers = list(backend.normalizer)
    if not any(isinstance(normalizer, Lowercase) for normalizer in normalizers):
        backend.normalizer = Normalizers([Lowercase(), *normalizers])


def lacked_end(name, tokenizer):
    """Return whether an early version of train_dense.py wrote the folder and its tokenizer appends
    no end token. Those versions appended it themselves for last-token pooling.
    """
    retriever = read_args(find_path(name)).get("retriever")
    if not isinstance(retriever, dict) or "end_token" in retriever:
        return False
    ids = tokenizer("a")["input_ids"]
    return ids[-1] not in tokenizer.all_special_ids


# ---------------------------------------------------------------- lengths

def settle_length(texts, role, name):
    """Set the length of queries or keys, and note its source."""
    flag = f"{role}_max_length"
    description = texts.descriptions[role]
    given = getattr(texts.settings, flag)
    if given is not None:
        texts.max_lengths[role], texts.sources[role] = given, f"--{flag}"
        return
    trained = read_trained_length(name, flag)
    of_tokenizer = find_own_length(texts.tokenizers[role], description.folder)
    if trained is not None:
        length, source = trained, "args.json"
    elif role in description.lengths:
        length, source = description.lengths[role], description.sources["lengths"]
    elif of_tokenizer is not None:
        length, source = of_tokenizer, "tokenizer"
    else:
        length, source = MAX_LENGTH, "default"
    texts.max_lengths[role], texts.sources[role] = length, os.path.basename(source)


def find_own_length(tokenizer, folder):
    """Return how many tokens the tokenizer keeps and the model has positions for, or None if
    neither is limited.
    """
    if os.path.isfile(folder):  # minDPR's and DPR's files were trained with MAX_LENGTH
        return None
    length = tokenizer.model_max_length
    positions = getattr(read_config(folder, "encoder"), "max_position_embeddings", None)
    if type(positions) is int and positions > 0:
        length = min(length, positions)
    return int(length) if length < UNLIMITED else None


# ---------------------------------------------------------------- prompts and instructions

def settle_version(texts, name, is_training):
    """Set whose instructions to use, and whether to use them: from flags, else from the
    checkpoint's training, else from the model's name. Training starts with BGE's, as in
    LLM-Embedder.
    """
    flags = texts.settings
    trained = {} if is_training else read_trained_flags(name)
    if flags.version is not None:
        texts.version, source = flags.version, "--version"
    elif trained.get("version"):
        texts.version, source = trained["version"], "args.json"
    else:
        texts.version, source = "bge" if is_training else named_version(name), "default"
    texts.sources["version"] = source
    texts.add_instruction = flags.add_instruction
    if flags.add_instruction is None:
        texts.add_instruction = trained.get("add_instruction", True)


def settle_prompts(texts, name, log, is_training):
    """Set the prompts: those of the flags, else those of the folder's files.

    They stay None where a flag, our args.json or the model's name chooses instructions by task.
    Raises InputError.
    """
    flags = texts.settings
    query = texts.descriptions["query"]
    given = {"query": flags.query_prompt, "key": flags.key_prompt}
    own = {role: texts.descriptions[role].prompts.get(role) for role in ROLES}
    if flags.names_instructions and not flags.names_prompts:
        return
    if not flags.names_prompts:
        check_default_prompt(query, own)
    if own["key"] is None and query.document_names and flags.key_prompt is None:
        log(f"note: {name}: its prompt {query.document_names[0]!r} is not used, as "
            "sentence-transformers' encode_document does not use it; --key_prompt sets one")
    # an empty prompt in one of our folders means training without a prompt; in other folders it
    # means nothing, because sentence-transformers always writes one
    was_trained_without = query.is_ours and own["query"] is not None and not is_training
    if flags.names_prompts or any(own.values()) or was_trained_without:
        texts.prompts = {role: given[role] if given[role] is not None else own[role] or ""
                         for role in ROLES}
        texts.sources["prompts"] = "config_sentence_transformers.json"
        if flags.names_prompts:
            texts.sources["prompts"] = "--query_prompt, --key_prompt"


def check_default_prompt(description, own):
    """Raise InputError if sentence-transformers' encode would put a prompt before texts and its
    encode_query and encode_document would not.
    """
    name = description.default_name
    if name and own["query"] is None and own["key"] is None:
        raise InputError(f"{description.folder}: its default_prompt_name {name!r} is used by "
                         "sentence-transformers' encode, and not by encode_query and "
                         "encode_document; set what comes before texts with --query_prompt and "
                         "--key_prompt ('' for nothing)")


def count_prompt(texts, role):
    """Return the number of tokens of a prompt, which the pooling leaves out.

    Raises InputError if instructions depend on the task.
    """
    if texts.prompts is None and any(any(pair) for pair in texts.instructions.values()):
        raise InputError(f"{texts.descriptions[role].folder}: the model leaves its prompt out of "
                         "the pooling (include_prompt), which instructions by task do not support; "
                         "give --query_prompt and --key_prompt, or --add_instruction false")
    prompt = texts.prompts[role] if texts.prompts else ""
    if not prompt:
        return 0
    tokenizer = texts.tokenizers[role]
    ids = tokenizer(prompt, truncation=True, max_length=texts.max_lengths[role])["input_ids"]
    # the tokenizer ends the prompt with an end token, but not when a text follows
    return len(ids) - (len(ids) > 0 and ids[-1] in tokenizer.all_special_ids)


# ---------------------------------------------------------------- the lines at the start of a run

def describe_texts(name, model, texts):
    """Return two lines on how a retriever makes vectors, with the source of each setting."""
    query = texts.descriptions["query"]
    encoder = model.query_encoder
    # the pooling's folder is named, too: 1_Pooling/config.json
    pooling_source = "/".join(texts.sources["pooling"].split(os.sep)[-2:])
    metric_source = os.path.basename(texts.sources["metric"])
    if encoder.head_first:
        normalised = "tokens normalised"
    elif query.normalises:
        normalised = "normalised by its modules"
    else:
        normalised = "normalised for cosines" if model.metric == "cos" else "not normalised"
    dimensions = f"{encoder.dimension} dimensions"
    if encoder.truncate_dim is not None:
        dimensions += f" of {encoder.untruncated_dimension}"
    vectors = (f"{name}: {dimensions}, pooling {encoder.pooling} ({pooling_source}), "
               f"{normalised}, metric {model.metric} ({metric_source})")
    if not query.sources and not query.is_ours and os.path.isdir(query.folder):
        vectors += "; no modules.json, so as sentence-transformers' defaults"

    prompts = "no prompts"
    if texts.prompts is not None and any(texts.prompts.values()):
        named = [repr(text) if text else "none" for text in texts.prompts.values()]
        prompts = f"prompts {' and '.join(named)} ({texts.sources['prompts']})"
    elif any(any(pair) for pair in texts.instructions.values()):
        prompts = f"instructions {texts.version} for texts with a task"
    lengths = (f"texts: {texts.max_lengths['query']} tokens per query ({texts.sources['query']}), "
               f"{texts.max_lengths['key']} per document ({texts.sources['key']}), {prompts}")
    if texts.appends_end:
        lengths += ", an end token after each"
    return f"{vectors}\n{lengths}"
