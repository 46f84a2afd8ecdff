"""How texts become token ids: tokenizers, lengths and prompts, settled once for all scripts.

Settings come from, in this order: flags, our args.json, the folder's other files, defaults.
"""
import os
from dataclasses import dataclass, field

from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from dense.description import Description, find_path, read_descriptions, read_transformer
from records.reading import read_args
from records.templates import INSTRUCTIONS
from training.checkpoints import load_tokenizer, read_config
from utils import InputError, shorten

MAX_LENGTH = 256   # tokens of a text if neither a flag nor a file sets it
UNLIMITED = 10 ** 7  # tokenizers without a length of their own have a larger one
ROLES = ("query", "key")


@dataclass
class Texts:
    """How the texts of a retriever (or ranker) become token ids.

    tokenizers    {query, key}; the same one for both where one encoder serves both
    prompts       {query, key} put before every text, or None: `instructions` are by task
    instructions  {task: (before a query, before a key)}, see INSTRUCTIONS
    appends_end   append the end token if the tokenizer does not, as early versions of
                  train_dense.py did for last-token pooling
    skip          {query, key}: tokens of the prompt that are left out of the pooling
    sources       {query, key, prompts: the flag or file that sets the length or the prompts}
    descriptions  {query, key: Description}, empty for a ranker
    """
    tokenizers: dict
    prompts: dict | None = None
    instructions: dict = field(default_factory=dict)
    appends_end: bool = False
    skip: dict = field(default_factory=dict)
    sources: dict = field(default_factory=dict)
    descriptions: dict = field(default_factory=dict)

    def instruction(self, task):
        """Return (the text before queries, the text before keys) of a task; nothing for records
        without a task, unless there are prompts.
        """
        if self.prompts is not None:
            return self.prompts["query"], self.prompts["key"]
        if not task:
            return "", ""
        for_other_tasks = self.instructions.get("", ("", ""))
        return self.instructions.get(task, for_other_tasks)


def settle_texts(args, key_name, log, is_training=False):
    """Return the Texts of --query_encoder and of `key_name`, the encoder of the keys if it is
    another; set the lengths in `args` that no flag gives.

    args.version_is_flag: a flag chooses the instructions. Raises InputError.
    """
    if args.ranker:
        return settle_pairs(args)
    descriptions = read_descriptions(args.query_encoder, key_name)
    query, key = descriptions["query"], descriptions["key"]
    tokenizer = open_tokenizer(query, args.query_encoder)
    if not is_training and args.pooling_method is None:
        check_chat_template(query, tokenizer)
    texts = Texts({"query": tokenizer, "key": tokenizer}, descriptions=descriptions)
    if key.folder != query.folder:
        texts.tokenizers["key"] = open_tokenizer(key, args.query_encoder)
    for role in ROLES:
        settle_length(args, texts, role)
    choose_prompts(args, texts, log, is_training)
    if texts.prompts is None and args.add_instruction:
        texts.instructions = INSTRUCTIONS[args.version]
    for role in ROLES:
        if descriptions[role].skips_prompt:
            texts.skip[role] = count_prompt(args, texts, role)
    pooling = args.pooling_method or query.pooling
    texts.appends_end = pooling == "last" and lacked_end(args.query_encoder, tokenizer)
    return texts


def settle_pairs(args):
    """Return the Texts of a ranker, whose query and key share the length of a pair."""
    folder = find_path(args.query_encoder)
    tokenizer = load_tokenizer(folder, folder)
    texts = Texts({"query": tokenizer, "key": tokenizer})
    stated = {role: stated_length(args.query_encoder, f"{role}_max_length") for role in ROLES}
    given = {role: getattr(args, f"{role}_max_length") or stated[role] for role in ROLES}
    if None in given.values():
        description = Description(folder)
        read_transformer(description, task="sequence-classification")
        length = description.lengths.get("query") or own_length(tokenizer, folder)
        share_out(given, length or 2 * MAX_LENGTH)
    args.query_max_length, args.key_max_length = given["query"], given["key"]
    return texts


def share_out(given, length):
    """Fill in the lengths {query, key} that are None, so that a pair has `length` tokens.

    A pair is cut as a whole, so that without flags it does not matter how they are shared out.
    """
    if given["query"] is None:
        given["query"] = length // 2 if given["key"] is None else max(length - given["key"], 3)
    if given["key"] is None:
        given["key"] = max(length - given["query"], 3)


# ---------------------------------------------------------------- tokenizers

def open_tokenizer(description, fallback):
    """Return the tokenizer of an encoder's folder, else that of `fallback`, with the lower case
    that the folder states.

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
    """Raise InputError for a language model that nobody has made a retriever of:
    sentence-transformers would put texts into its chat template.
    """
    is_plain = os.path.isdir(description.folder) and not description.has_modules
    if is_plain and tokenizer.chat_template:
        raise InputError(f"{description.folder}: has a chat template and no modules.json, so that "
                         "nothing states how it makes vectors; give a retriever, or "
                         "--pooling_method to read texts without the template")


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
    """Return whether a folder is ours, of a time when train_dense.py put an end token behind the
    texts of last-token pooling, and its tokenizer does not end texts itself.
    """
    stated = read_args(find_path(name)).get("retriever")
    if not isinstance(stated, dict) or "end_token" in stated:
        return False
    ids = tokenizer("a")["input_ids"]
    return ids[-1] not in tokenizer.all_special_ids


# ---------------------------------------------------------------- lengths

def settle_length(args, texts, role):
    """Set --query_max_length or --key_max_length where no flag has, and note what states it."""
    name = f"{role}_max_length"
    description = texts.descriptions[role]
    if getattr(args, name) is not None:
        texts.sources[role] = f"--{name}"
        return
    stated = stated_length(args.query_encoder, name)
    of_tokenizer = own_length(texts.tokenizers[role], description.folder)
    if stated is not None:
        length, source = stated, "args.json"
    elif role in description.lengths:
        length, source = description.lengths[role], description.sources["lengths"]
    elif of_tokenizer is not None:
        length, source = of_tokenizer, "tokenizer"
    else:
        length, source = MAX_LENGTH, "default"
    setattr(args, name, length)
    texts.sources[role] = os.path.basename(source)


def stated_length(name, flag):
    """Return the length that one of our folders was trained with, None for another folder.

    Raises InputError.
    """
    path = find_path(name)
    flags = read_args(path).get("args", {})
    length = flags.get(flag) if isinstance(flags, dict) else None
    if length is not None and (type(length) is not int or not 0 < length < UNLIMITED):
        raise InputError(f"{path}/args.json: states {flag} {shorten(length)}, which is no length; "
                         "correct it")
    return length


def own_length(tokenizer, folder):
    """Return the most tokens that a tokenizer gives, and a model without other settings reads; None
    where neither states it.
    """
    if os.path.isfile(folder):  # minDPR's and DPR's were trained with MAX_LENGTH
        return None
    length = tokenizer.model_max_length
    positions = getattr(read_config(folder, "encoder"), "max_position_embeddings", None)
    if type(positions) is int and positions > 0:
        length = min(length, positions)
    return int(length) if length < UNLIMITED else None


# ---------------------------------------------------------------- prompts

def choose_prompts(args, texts, log, is_training):
    """Set the Texts' prompts: those of the flags, else those that the folder states.

    They stay None where a flag, our args.json or the model's name chooses instructions by task.
    Raises InputError.
    """
    query = texts.descriptions["query"]
    flags = {"query": args.query_prompt, "key": args.key_prompt}
    by_flag = flags["query"] is not None or flags["key"] is not None
    own = {role: texts.descriptions[role].prompts.get(role) for role in ROLES}
    if args.version_is_flag and not by_flag:
        texts.sources["prompts"] = "--version" if args.add_instruction else "--add_instruction"
        return
    if not by_flag:
        check_default_prompt(query, own)
    if own["key"] is None and query.document_names and flags["key"] is None:
        log(f"note: {args.query_encoder}: its prompt {query.document_names[0]!r} is not used, as "
            "sentence-transformers' encode_document does not use it; --key_prompt sets one")
    # a folder of ours states that it was trained without; sentence-transformers writes empty ones
    states_none = query.is_ours and own["query"] is not None and not is_training
    if by_flag or any(own.values()) or states_none:
        texts.prompts = {role: flags[role] if flags[role] is not None else own[role] or ""
                         for role in ROLES}
        texts.sources["prompts"] = "config_sentence_transformers.json"
        if by_flag:
            texts.sources["prompts"] = "--query_prompt, --key_prompt"


def check_default_prompt(description, own):
    """Raise InputError where encode would put a prompt before texts, and encode_query and
    encode_document would not.
    """
    name = description.default_name
    if name and own["query"] is None and own["key"] is None:
        raise InputError(f"{description.folder}: its default_prompt_name {name!r} is used by "
                         "sentence-transformers' encode, and not by encode_query and "
                         "encode_document; say what to put before texts with --query_prompt and "
                         "--key_prompt ('' for nothing)")


def count_prompt(args, texts, role):
    """Return the number of tokens of a prompt, which the pooling leaves out.

    Raises InputError where instructions go by task.
    """
    if texts.prompts is None and any(any(pair) for pair in texts.instructions.values()):
        raise InputError(f"{texts.descriptions[role].folder}: the model leaves its prompt out of "
                         "the pooling (include_prompt), which instructions by task do not support; "
                         "give --query_prompt and --key_prompt, or --add_instruction false")
    prompt = texts.prompts[role] if texts.prompts else ""
    if not prompt:
        return 0
    tokenizer = texts.tokenizers[role]
    ids = tokenizer(prompt, truncation=True,
                    max_length=getattr(args, f"{role}_max_length"))["input_ids"]
    # an end token stands behind the prompt, and not between it and a text
    return len(ids) - (len(ids) > 0 and ids[-1] in tokenizer.all_special_ids)


# ---------------------------------------------------------------- the line at the start of a run

def describe_texts(args, model, texts):
    """Return a line on how a retriever makes vectors, with the source of each setting."""
    query = texts.descriptions["query"]

    def source(name, flag=None):
        if flag and getattr(args, f"{flag}_is_flag", False):
            return f"--{flag}"
        path = query.sources.get(name, "default")
        parts = path.split(os.sep)
        return "/".join(parts[-2:]) if name == "pooling" else parts[-1]
    encoder = model.query_encoder
    if encoder.head_first:
        normalised = "each token normalised"
    elif query.normalises:
        normalised = "normalised by its modules"
    else:
        normalised = "normalised for cosines" if model.metric == "cos" else "not normalised"
    prompts = "no prompts"
    if texts.prompts is not None and any(texts.prompts.values()):
        named = [repr(text) if text else "none" for text in texts.prompts.values()]
        prompts = f"prompts {' and '.join(named)} ({texts.sources['prompts']})"
    elif any(any(pair) for pair in texts.instructions.values()):
        prompts = f"instructions {args.version} for texts with a task"
    metric = source("metric", "dense_metric")
    line = (f"{args.query_encoder}: pooling {encoder.pooling} "
            f"({source('pooling', 'pooling_method')}), {normalised}, metric {model.metric} "
            f"({metric}), {args.query_max_length} tokens per query ({texts.sources['query']}), "
            f"{args.key_max_length} per document ({texts.sources['key']}), {prompts}, "
            f"{encoder.dimension} dimensions")
    if encoder.truncate_dim is not None:
        line += f" of {encoder.untruncated_dimension}"
    if texts.appends_end:
        line += ", an end token behind each text"
    if not query.sources and not query.is_ours and os.path.isdir(query.folder):
        line += "; no modules.json: defaults are sentence-transformers'"
    return line
