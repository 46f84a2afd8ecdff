"""Open a reader and its tokenizer: FiDT5 for a T5, CausalReader for a causal language model."""
import os
from typing import NamedTuple

from model import CLASSES, NEEDED, FiDT5
from reader.causal import (
    ANSWER_LINES,
    PASSAGE_WEIGHTS,
    TEMPLATE,
    CausalReader,
    Prompts,
    choose_prompts,
)
from reader.causal_lm import is_causal
from records.reading import read_args
from training.checkpoints import (
    find_base,
    find_model,
    find_weights,
    has_tokenizer,
    load_tokenizer,
    log_on_main,
    read_config,
    read_training_args,
)
from training.t5_folder import carries_tokenizer, list_settings, open_t5_tokenizer
from utils import SWITCH, InputError, shorten

FALLBACK = "t5-base"             # T5, T5 v1.1 and Flan-T5 share its vocabulary
FALLBACK_SIZES = (32100, 32128)  # smallest and largest number of embeddings with that vocabulary
# a tokenizer with fewer tokens than this share of the embeddings may belong to another model
SPARSE = 0.9


def add_causal_flags(parser):
    """Add the flags of causal language models. Their defaults are the checkpoint's values, else
    the values in the help.
    """
    add = parser.add_argument_group("causal language models").add_argument
    add("--prompt_template", metavar="TEXT",
        help="the prompt of one passage, with {question}, {title} and {text}; \\n is a line break. "
        "Lines with only the passage are left out if a question has no contexts. The answer "
        "follows the whitespace at the end of the template, or a space; default: the checkpoint's "
        f"value, or '{TEMPLATE}'")
    add("--chat_template", default=None, **SWITCH,
        help="put the prompt into the user's turn of the tokenizer's chat template, and the answer "
        "into the assistant's; default: the checkpoint's value, or false")
    add("--answer_lines", choices=ANSWER_LINES,
        help="first: an answer ends at its first line break; all: only at an end token; default: "
        "the checkpoint's value, or all in training and first for models not trained here")
    add("--passage_weights", choices=PASSAGE_WEIGHTS,
        help="weight of a passage in the loss and in the answer: equal, or score, the softmax of "
        "the retrieval scores; default: the checkpoint's value, or equal")
    add("--retriever_temperature", type=float, metavar="T",
        help="divide the retrieval scores by T before the softmax; default: the checkpoint's "
        "value, or 1")


def open_with_tokenizer(path_or_name, log, chosen=None, fallback=None, dropout=None,
                        prompt_flags=None, trained=False, trains=False):
    """Return (reader, tokenizer) of a checkpoint, fitted to each other, and log a line about them.

    chosen, fallback: see open_reader_tokenizer. The other arguments: see open_reader. A reader that
    `trains` drops the settings of generation_config.json. Raise InputError for a checkpoint that
    cannot be opened, and for a tokenizer that does not fit.
    """
    tokenizer, origin = open_reader_tokenizer(path_or_name, chosen, fallback)
    reader = open_reader(path_or_name, dropout, prompt_flags, trained, trains)
    reader.check_tokenizer(tokenizer)
    settings = reader.forget_generation() if trains else {}
    log(describe_reader(path_or_name, reader, tokenizer, origin))
    if settings:
        log(f"note: {path_or_name}: generation_config.json's {describe_settings(settings)} are not "
            "used in training, and not saved: answers are greedy")
    return reader, tokenizer


def open_reader(path_or_name, dropout=None, prompt_flags=None, trained=False, trains=False):
    """Return the reader of a checkpoint: a FiDT5 or CausalReader, by its config.json.

    dropout: replaces the configuration's rates. prompt_flags: {name: value}; only the flags of
    add_causal_flags are used. trained: refuse a checkpoint without weights. trains: the reader will
    be trained, so its answers end only with an end token. Raise InputError for other models, and
    for a checkpoint that the reader's class refuses.
    """
    given = {name: value for name, value in (prompt_flags or {}).items()
             if name in Prompts._fields and value is not None}
    if os.path.isfile(path_or_name):  # minFiD's checkpoint
        return open_fid(path_or_name, dropout, given, trained)
    folder = find_base(find_model(path_or_name)[0])
    config = read_config(folder, "T5 or causal language")
    if config.model_type in CLASSES:
        return open_fid(path_or_name, dropout, given, trained)
    if not is_causal(config):
        raise InputError(f"{folder}: is a {config.model_type} model; {NEEDED}, or a causal "
                         "language model (GPT-2, Llama, Qwen2, ...)")
    stated = read_training_args(path_or_name)
    prompts = choose_prompts(given, stated.get("prompts", {}), path_or_name)
    find_weights(folder, required=trained)
    if not trains and "num_contexts" not in stated and "answer_lines" not in given:
        prompts = prompts._replace(answer_lines="first")
        log_on_main(f"note: {path_or_name} was not trained here: its answers end at the first "
                    "line break (--answer_lines all: only at an end token)")
    return CausalReader.from_pretrained(path_or_name, dropout, prompts)


def open_fid(path_or_name, dropout, given, trained):
    """Return a FiDT5. Raise InputError if flags of causal language models are given."""
    if given:
        raise InputError(f"--{min(given)} is for causal language models, {path_or_name} is a T5; "
                         "leave it out")
    return FiDT5.from_pretrained(path_or_name, dropout, trained)


# ---------------------------------------------------------------- the tokenizer

class Origin(NamedTuple):
    """Describe where a reader's tokenizer comes from."""
    name: str
    reason: str     # why this tokenizer is used, or "" if it is the checkpoint's own
    ignored: list   # descriptions of the settings in its files that are not followed


def open_reader_tokenizer(path_or_name, chosen=None, fallback=None):
    """Return (tokenizer, Origin) for a reader's checkpoint.

    Take the tokenizer of the model `chosen` or, if that is None, the checkpoint's own. If the
    checkpoint has no tokenizer, take that of `fallback`, of the model that the checkpoint was
    trained from, or of t5-base if the size fits. Set it to truncate on the right and to decode
    without clean-up. Raise InputError, with a list of the models that were tried, if no tokenizer
    is found.
    """
    path = str(path_or_name)
    folder = find_model(path)[0]
    base = find_base(folder)  # the model that adapters belong to, else the folder itself
    config = read_config(base, "T5 or causal language")
    is_t5 = config.model_type in CLASSES
    carries = carries_tokenizer if is_t5 else has_tokenizer
    if chosen:
        candidates = [(chosen, "--tokenizer")]
    elif carries(folder) and not os.path.isfile(path):
        candidates = [(folder, "")]
    elif base != folder:
        candidates = [(base, "the adapters' model")]
    else:
        candidates = list_tokenizer_models(path, folder, fallback, config)
    tried = []
    for name, reason in candidates:
        try:
            source = find_model(name, with_weights=False)[0]
        except InputError as error:
            tried.append(f"{name} ({reason}) cannot be opened: {str(error).split(';')[0]}")
            continue
        if carries(source):
            tokenizer = (open_t5_tokenizer(source, config.vocab_size) if is_t5
                         else load_tokenizer(source, source))
            name = name if reason else path
            return tokenizer, Origin(name, reason, settle_settings(tokenizer))
        tried.append(f"{name} ({reason}) has none")
    raise InputError(f"{path}: has no tokenizer{''.join(f'; {text}' for text in tried)}; name the "
                     "model whose tokenizer it was trained with: --tokenizer NAME")


def list_tokenizer_models(path, folder, fallback, config):
    """Return [(model, reason)], the likeliest first, of the models whose tokenizer a checkpoint
    without one may have been trained with.
    """
    candidates = []
    if fallback:
        beside = os.path.join(os.path.dirname(path), fallback)
        is_beside = os.path.isfile(path) and os.path.isdir(beside)
        candidates.append((beside if is_beside else fallback, "--t5_name"))
    if os.path.isfile(path):
        candidates.append((folder, "the checkpoint's t5_name"))
    else:
        flags = read_args(path).get("args", {})
        name = flags.get("t5_name") if isinstance(flags, dict) else None
        if isinstance(name, str):
            candidates.append((name, "the checkpoint's t5_name"))
    lowest, highest = FALLBACK_SIZES
    if config.model_type == "t5" and lowest <= config.vocab_size <= highest and not fallback:
        candidates.append((FALLBACK, "the vocabulary of T5 is assumed"))
    return candidates


def settle_settings(tokenizer):
    """Set how a reader's tokenizer truncates and decodes. Return descriptions of the settings that
    this replaces.
    """
    ignored = []
    if tokenizer.truncation_side != "right":
        ignored.append(f"truncation_side {tokenizer.truncation_side}")
    if tokenizer.clean_up_tokenization_spaces:
        ignored.append("clean_up_tokenization_spaces")
    tokenizer.truncation_side, tokenizer.clean_up_tokenization_spaces = "right", False
    return ignored


def describe_reader(path, reader, tokenizer, origin):
    """Return a line about an opened reader: its model, tokenizer, special tokens and settings."""
    is_t5 = isinstance(reader, FiDT5)
    notes = reader.id_notes if is_t5 else {}
    first_end, *other_ends = reader.end_tokens
    ends = [describe_token(tokenizer, first_end, notes.get("</s>")),
            *(describe_token(tokenizer, end) for end in other_ends)]
    line = (f"reader {path}: {reader.config.model_type}, {describe_origin(origin)}; answers end "
            f"with {', '.join(ends)}")
    ignored, settings = origin.ignored, {}
    if is_t5:
        start = describe_token(tokenizer, reader.start_token)
        pad = describe_token(tokenizer, reader.config.pad_token_id, notes.get("<pad>"))
        line += f", begin with {start}, padding {pad}"
        count, embeddings = len(tokenizer), reader.config.vocab_size
        if count < SPARSE * embeddings:
            line += f"; the tokenizer has {count:,} tokens, the model embeds {embeddings:,}"
        ignored = ignored + reader.ignored
        settings = list_settings(reader.t5.generation_config)
    if ignored:
        line += f"; not followed: {', '.join(ignored)}"
    if settings:
        line += f"; generation_config.json: {describe_settings(settings)}"
    return line


def describe_origin(origin):
    """Return a few words about where a reader's tokenizer comes from."""
    if not origin.reason:
        return "its own tokenizer"
    return f"the tokenizer of {origin.name} ({origin.reason})"


def describe_settings(settings):
    """Return a text of {name: value}."""
    return ", ".join(f"{name} {shorten(value)}" for name, value in settings.items())


def describe_token(tokenizer, token, before=None):
    """Return a token and its id as a text; before: another id in config.json that it replaces."""
    text = f"{tokenizer.convert_ids_to_tokens(token)} {token}"
    return text if before is None else f"{text} (config.json: {before})"
