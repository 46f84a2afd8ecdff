r"""Scores passages by how likely they make the answer to a language model.

    python lm_score.py --eval_data train.json --model_name_or_path meta-llama/Llama-2-7b-chat-hf
    torchrun --nproc_per_node=8 lm_score.py --eval_data llm-embedder:qa/msmarco/train.json \
        --save_name llama2-7b
    python lm_score.py --eval_data train.ctxs.jsonl --model_name_or_path OUT --likelihood sum

train.json becomes train.scored.NAME.json, with log p(answer | question, key) for each of a record's
keys as `teacher_scores`, which train_dense.py distils from. The model is a causal language model, a
sequence-to-sequence model, or a reader of train_epoch.py, which then reads one passage at a time.
Sources: LLM-Embedder (arXiv 2310.07554, section 3.2), REPLUG (arXiv 2301.12652, section 4). After a
crash the same command goes on where it was.
"""
import json
import math
import os
from collections import defaultdict
from itertools import islice
from typing import NamedTuple

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from data import Collator, encode_inputs, format_passage
from layers.causal import Text, log_likelihoods, score_answers, sum_by_text
from layers.packed_attention import split_by_length
from model import CLASSES, FiDT5, Memory
from reader.borders import add_start, chat_frame, encode_pairs, start_tokens
from reader.causal import PromptCollator, choose_prompts
from reader.causal_lm import open_causal_lm
from reader.open import describe_origin, open_reader_tokenizer, open_with_tokenizer
from reader.predict import add_tokenizer_flags
from records.corpus import open_corpus
from records.fields import check_types, gold_answers, has_keys, has_text, is_context, labelled_keys
from records.files import check_paths, new_file
from records.hashes import hash_file, hash_windows, model_files
from records.journal import Journal
from records.questions import read_questions, refuse_table
from records.templates import check_template, format_key
from retrieval.mining import check_indices, collated_path
from training.checkpoints import (
    check_fit,
    check_vocabulary,
    find_base,
    find_model,
    find_weights,
    load_tokenizer,
    read_config,
    read_training_args,
)
from utils import (
    LONG_PATIENCE,
    SWITCH,
    InputError,
    Parser,
    check_at_least,
    find_files,
    gather_lists,
    progress_bar,
    refusing,
    resolve_path,
    run_script,
    shorten,
    start_processes,
    wait_for_all,
)

KNOWLEDGE = "Knowledge: {key}\n\nQuestion: {query}\n\nAnswer: {answer}"
# LLM-Embedder's; it has none for tool
TEMPLATES = {
    "qa": KNOWLEDGE,
    "convsearch": KNOWLEDGE,
    "icl": "{key}\n{query}\n{answer}",
    "chat": "{key}\nSpeaker 1: {query}\nSpeaker 2: {answer}",
    "lrlm": "{key}{context}{query}{answer}",  # token ids side by side
    "tool": "Tool: {key}\n\nRequest: {query}\n\nAnswer: {answer}",
}
STRIPPED = ("qa", "convsearch", "tool")  # tasks whose texts lose the blanks around them
FILE_WINDOWS = 256  # windows of a model's or a corpus's files that tell it from another
FREE_FLAGS = {"gpus", "data_root", "output", "eval_data", "model_name_or_path"}  # see Journal
SEQ2SEQ_TOKENS = {"cpu": 4096, "cuda": 16384}  # of prompts, encoded at a time, with padding


class Job(NamedTuple):
    """A record's candidates, to be scored by the likelihood of its answers."""
    record: dict
    question: str
    keys: list      # texts; passages {title, text} for a reader
    answers: list
    template: str
    is_stripped: bool
    location: str


class Scorer(NamedTuple):
    """A model, and what it is given."""
    kind: str          # causal, t5 or seq2seq
    model: object
    tokenizer: object
    device: torch.device
    limit: int         # tokens: of a whole text, of a sequence-to-sequence model's input
    is_reader: bool    # it reads passages in prompts of its own
    prompts: object    # a causal reader's Prompts
    is_packed: bool    # the causal model takes texts side by side
    frame: tuple       # texts before and after a prompt, of --chat_template


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--eval_data", required=True, metavar="FILE",
        help="records with answers and keys: pos and neg, history, or ctxs; .json or .jsonl, may "
        "end in .gz")
    add("--corpus", nargs="+", metavar="FILE",
        help="documents, only for records with pos_index and neg_index")
    add("--key_template", default="{title} {text}",
        help="the text of a key that is an object, or a document")
    add("--data_root", default="/data/llm-embedder", help="what llm-embedder:PATH is relative to")
    add("--save_name",
        help="name in the output file: train.json becomes train.scored.NAME.json; default: the "
        "last part of the model's name")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", default="meta-llama/Llama-2-7b-chat-hf",
        help="causal language model, sequence-to-sequence model, or reader: folder or hub name")
    add("--reader", action="store_true",
        help="the model is a reader with its own prompts, although its folder does not have the "
        "args.json of train_epoch.py")
    add_tokenizer_flags(add)
    add("--bf16", action="store_true", help="compute in bfloat16, not in float32")
    add = parser.add_argument_group("texts").add_argument
    add("--chat_template", default=None, **SWITCH,
        help="make the text before the answer the user's turn of the tokenizer's chat template, "
        "and the answer the assistant's (causal language models); default: for a reader as "
        "trained, else false")
    add("--template",
        help="text with {key}, {query} and, at its end, {answer}; \\n is a new line; default: "
        "LLM-Embedder's for the record's task, or qa if it has none; a reader uses its own")
    add("--context_max_length", type=int, default=1024,
        help="maximum tokens per text, at most the model's positions; keys are truncated to fit")
    add("--key_max_length", type=int, default=512, help="tokens per key, truncated on the right")
    add = parser.add_argument_group("scores").add_argument
    add("--likelihood", choices=["mean", "sum"], default="mean",
        help="log-likelihood of the answer: mean over its tokens (LLM-Embedder), or their sum "
        "(REPLUG)")
    add("--answer", choices=["first", "best", "mean"], default="first",
        help="which answer to score if a record has several: its target, else the first; the most "
        "likely one; or the mean of all scores")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", "--lm_batch_size", type=int, default=8,
        help="questions at a time; the model's batches are sized by tokens to suit the device")
    add("--gpus", default="",
        help="CUDA_VISIBLE_DEVICES, for example 0,1; default: none, which runs on the CPU")
    return parser.parse_args()


def check_args(args):
    """Raises InputError for flags that cannot work; resolves paths."""
    check_at_least(args, {"context_max_length": 2, "key_max_length": 1, "batch_size": 1})
    check_template("key_template", args.key_template, defaultdict(str))
    args.eval_data = resolve_path(args.eval_data, args.data_root)
    args.model_name_or_path = resolve_path(args.model_name_or_path, args.data_root)
    args.corpus = [file for path in args.corpus or [] for file in find_files(path, args.data_root)]
    if args.template is not None:
        args.template = args.template.replace("\\n", "\n")
        check_text_template(args.template)
    name = args.save_name or os.path.basename(args.model_name_or_path.rstrip("/"))
    args.output = collated_path(args.eval_data, "scored", name)
    check_paths([args.output], [args.eval_data, args.model_name_or_path, *args.corpus])


def check_text_template(template):
    """Raises InputError for a --template without one place for the key, or the answer at its end.
    """
    if template.count("{key}") != 1:
        raise InputError(f"--template {shorten(template)} must name {{key}} once: that is where "
                         "the passage goes")
    if template.count("{answer}") != 1 or not template.endswith("{answer}"):
        raise InputError(f"--template {shorten(template)} must end with {{answer}}: the "
                         "likelihood is of what follows on all else")


# ---------------------------------------------------------------- records

def read_jobs(args, is_reader, world):
    """A Job per record of --eval_data. Raises InputError for one that cannot be scored."""
    refuse_table(args.eval_data, "a table has no keys; run retrieve.py --output FILE.jsonl first")
    corpus = open_corpus(args.corpus, args.key_template, world) if args.corpus else None
    jobs = []
    for question in read_questions(args.eval_data):
        keys = list_keys(question, corpus)
        if is_reader:
            keys = [to_context(key, args.key_template, question.location) for key in keys]
        else:
            keys = [format_key(key, args.key_template, question.location) for key in keys]
        template, is_stripped = args.template, True
        if template is None:
            task = question.task or "qa"
            if task not in TEMPLATES:
                raise InputError(f"{question.location}: there is no template for the task "
                                 f"{shorten(task)}, only for {', '.join(TEMPLATES)}; give one with "
                                 "--template")
            template, is_stripped = TEMPLATES[task], task in STRIPPED
        jobs.append(Job(question.record, question.text, keys, choose_answers(question, args.answer),
                        template, is_stripped, question.location))
    return jobs


def list_keys(question, corpus):
    """Return the keys of a record, in the order of its teacher_scores: those of labelled_keys,
    ctxs, or the documents that pos_index and neg_index name.

    Raises InputError for a record without any of these fields.
    """
    record = question.record
    check_types(record, question.location, ["key", "history", "ctxs"])
    fields = ("positive_ctxs", "pos", "neg", "history", "ctxs", "key", "pos_index", "neg_index")
    if all(record.get(name) is None for name in fields) and not has_keys(record):
        raise InputError(f"{question.location}: no keys: neither 'pos' and 'neg', nor 'history', "
                         "nor 'ctxs'; retrieve.py --output, or --metrics collate_neg, adds some")
    positives, negatives = labelled_keys(record)
    keys = [*positives, *negatives] or record.get("ctxs") or record.get("key") or []
    indices = [*(record.get("pos_index") or []), *(record.get("neg_index") or [])]
    if keys or not indices:
        return keys
    if corpus is None:
        raise InputError(f"{question.location}: keys are named by their indices only; give the "
                         "corpus with --corpus")
    check_indices(question, indices, corpus)
    return [corpus.passage(index) for index in indices]


def to_context(key, template, location):
    """A key as a passage {title, text}, which a reader reads."""
    if is_context(key):
        return key
    return {"text": format_key(key, template, location)}


def choose_answers(question, how):
    """Return the answers whose likelihood is asked for. Raises InputError where there is none."""
    answers, target = gold_answers(question.record, question.location)
    own_target = question.record.get("target")
    if isinstance(own_target, str) and has_text(own_target):
        target = own_target
    if how == "first" and target is not None:
        answers = [target]
    answers = answers[:1] if how == "first" else list(dict.fromkeys(answers))
    if not answers:
        raise InputError(f"{question.location}: no answer, whose likelihood could be computed; add "
                         "'answers', or drop the record")
    return answers


# ---------------------------------------------------------------- models

def open_scorer(args, is_reader, trained, config, world):
    """Return the Scorer of --model_name_or_path; `trained`: what it says of its training.

    Raises InputError.
    """
    name = args.model_name_or_path
    num_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    limit = min(args.context_max_length, num_positions)
    if is_reader:
        limit = trained.get("max_length") or limit  # of a prompt
    prompts, is_packed = None, False
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if config.model_type in CLASSES:
        kind = "t5"
        model, tokenizer = open_with_tokenizer(name, world.log, args.tokenizer, args.t5_name,
                                               trained=True)
        model.to(world.device).eval()
        if is_reader:
            model.set_lengths(limit, None)
    elif config.is_encoder_decoder:
        tokenizer = load_tokenizer(args.tokenizer or name, name)
        kind, model = "seq2seq", open_seq2seq(name, dtype, world.device)
    else:
        kind = "causal"
        if is_reader:
            tokenizer, origin = open_reader_tokenizer(name, args.tokenizer, args.t5_name)
        else:
            tokenizer = load_tokenizer(args.tokenizer or name, name)
        model, reason = open_causal_lm(name, world.device, dtype,
                                       None if is_reader else limit)
        is_packed = reason is None
        if not is_packed:
            world.log(f"note: {name} has {reason}: its texts are padded, which takes longer")
        if is_reader:
            given = {} if args.chat_template is None else {"chat_template": args.chat_template}
            prompts = choose_prompts(given, trained.get("prompts", {}), name)
            world.log(f"reader {name}: {config.model_type}, {describe_origin(origin)}")
    check_vocabulary(tokenizer, embeddings_of(model), "give the folder that the model came with")
    frame = ("", "")
    if args.chat_template and not is_reader:
        if kind != "causal":
            raise InputError(f"--chat_template is for causal language models, {name} is a "
                             f"{config.model_type} model; leave it out")
        frame = chat_frame(tokenizer)
    return Scorer(kind, model, tokenizer, world.device, limit, is_reader, prompts, is_packed, frame)


def describe(scorer):
    """What the model is, in words."""
    kinds = {"causal": "causal language model", "t5": "T5", "seq2seq": "sequence-to-sequence model"}
    return f"reader ({kinds[scorer.kind]})" if scorer.is_reader else kinds[scorer.kind]


def embeddings_of(model):
    """The embedding of a model's tokens."""
    return model.t5.shared if isinstance(model, FiDT5) else model.get_input_embeddings()


def open_seq2seq(name, dtype, device):
    """Return a sequence-to-sequence model other than a T5, such as BART. Raises InputError."""
    folder, _ = find_model(name)
    find_weights(folder, required=True)
    with refusing(f"{name}: its weights cannot be read", "fetch the folder again"):
        model, loading = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    check_fit(loading["missing_keys"], loading["mismatched_keys"], loading["unexpected_keys"], name,
              unused_is_fine=True)
    if model.config.pad_token_id is None:
        raise InputError(f"{name}: config.json says no pad_token_id, which the decoder of a "
                         "sequence-to-sequence model begins and is padded with; add it")
    return model.to(device).eval()


# ---------------------------------------------------------------- texts

def make_family(scorer, job, key_max_length):
    """For each key of a job a list of Texts, one per answer; keys are cut to fit.

    Raises InputError if question and answer do not fit.
    """
    if scorer.is_reader:
        return make_reader_texts(scorer, job)
    tokenizer = scorer.tokenizer
    key_ids = tokenizer(job.keys, add_special_tokens=False, verbose=False)["input_ids"]
    keys = list(job.keys)
    for i, ids in enumerate(key_ids):
        if len(ids) > key_max_length:
            key_ids[i] = ids[:key_max_length]
            keys[i] = decode_key(tokenizer, key_ids[i])
    family = make_texts(scorer, job, keys)
    for i, ids in enumerate(key_ids):
        while excess := max(count_excess(scorer, text) for text in family[i]):
            if not ids:
                raise InputError(f"{job.location}: question and answer take {excess} tokens more "
                                 f"than the {scorer.limit} that a text may have; shorten them, or "
                                 "raise --context_max_length if the model has the positions")
            ids = ids[:max(0, len(ids) - excess)]
            family[i] = make_texts(scorer, job, [decode_key(tokenizer, ids)])[0]
    return family


def check_jobs(scorer, jobs):
    """Raise InputError for a job whose question and answers do not fit without a key, before any is
    scored: with keys, which are cut, they fit as well.
    """
    for job in jobs:
        if not job.keys:
            continue
        key = ""
        if scorer.is_reader:  # titles are not cut
            key = {"title": max((context.get("title") or "" for context in job.keys), key=len),
                   "text": ""}
        make_family(scorer, job._replace(keys=[key]), 1)


def decode_key(tokenizer, ids):
    """The text of a key that was cut to these ids; half a character at its end goes."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def count_excess(scorer, text):
    """The tokens that a Text has beyond the limit."""
    length = len(text.prompt) + (len(text.answer) if scorer.kind == "causal" else 0)
    return max(0, length - scorer.limit)


def make_texts(scorer, job, keys):
    """Return for each key a list of Texts, one per answer, of the job's template."""
    answers = [strip(answer, job) for answer in job.answers]
    if scorer.kind == "causal" and job.template == TEMPLATES["lrlm"]:
        if any(scorer.frame):
            raise InputError(f"{job.location}: lrlm's texts go on from one another and are no "
                             "conversation; leave --chat_template out, or give --template")
        return make_side_by_side(scorer, job, keys, answers)
    prompts = [fill_template(job, key) for key in keys]
    if scorer.kind == "causal":
        before, after = scorer.frame
        if before or after:
            prompts = [before + prompt.strip() + after for prompt in prompts]
        return make_causal_texts(scorer.tokenizer, prompts, answers, job.location)
    prompt_ids = scorer.tokenizer([prompt.rstrip() for prompt in prompts],
                                  verbose=False)["input_ids"]
    answer_ids = scorer.tokenizer(text_target=answers, verbose=False)["input_ids"]
    return [[Text(ids, answer) for answer in answer_ids] for ids in prompt_ids]


def strip(text, job):
    """A text of the job as its template has it."""
    return text.strip() if job.is_stripped else text


def fill_template(job, key):
    """The text of the job's template up to the answer, with this key."""
    before, after = job.template.removesuffix("{answer}").split("{key}")
    before, after = (part.replace("{context}", context_text(job))
                     .replace("{query}", strip(job.question, job)) for part in (before, after))
    return before + strip(key, job) + after


def context_text(job):
    """The text that precedes an lrlm record's question. Raises InputError."""
    context = job.record.get("context") or ""
    if not isinstance(context, str):
        raise InputError(f"{job.location}: 'context' must be a text, it is {shorten(context)}")
    return context


def make_causal_texts(tokenizer, prompts, answers, location):
    """Return for each prompt a list of Texts, one per answer, split where the prompt ends
    (reader/borders.py).

    Special tokens stand before as the tokenizer has them, none after (LLM-Embedder).
    """
    start = start_tokens(tokenizer)
    pairs = iter(encode_pairs(tokenizer, [prompt for prompt in prompts for _ in answers],
                              answers * len(prompts)))
    family = []
    for _ in prompts:
        family.append([make_text(tokenizer, add_start(start, pair.prompt), pair.answer, location)
                       for pair in islice(pairs, len(answers))])
    return family


def make_text(tokenizer, prompt, answer, location):
    """The Text of ids. A prompt without a token begins with the start token, or else the end token:
    the answer's first token must follow on something.
    """
    if not answer:
        raise InputError(f"{location}: an answer has no tokens of its own; drop the record")
    if not prompt:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise InputError(f"{location}: nothing stands before the answer, and the tokenizer has "
                             "no start token; begin --template with some text")
        prompt = [start]
    return Text(prompt, answer)


def make_side_by_side(scorer, job, keys, answers):
    """For each key a list of Texts as LLM-Embedder has them for lrlm: the ids of key, context,
    question and answer side by side, without special tokens.

    The context's oldest tokens go first where a text is too long.
    """
    def to_rows(texts):
        return scorer.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    key_rows, answer_rows = to_rows(keys), to_rows(answers)
    context, query = to_rows([context_text(job), job.question])
    longest_answer = max(len(ids) for ids in answer_rows)
    family = []
    for key in key_rows:
        room = max(0, scorer.limit - len(key) - len(query) - longest_answer)
        prompt = key + context[max(0, len(context) - room):] + query
        family.append([make_text(scorer.tokenizer, prompt, answer, job.location)
                       for answer in answer_rows])
    return family


def make_reader_texts(scorer, job):
    """Return for each passage a list of Texts as the reader was trained: with the record's
    chat_history, the passage cut on the right, and </s> behind the answer.

    Raises InputError if question and answer do not fit.
    """
    tokenizer, room = scorer.tokenizer, scorer.limit
    record = job.record | {"question": job.question, "ctxs": job.keys}
    if scorer.kind == "t5":
        collator = Collator(tokenizer, 1, room)
        answers = [collator.target_ids(answer) for answer in job.answers]
        prompts = encode_inputs(tokenizer, [record], len(job.keys), room)[0]
        bare = format_passage(job.question, {"text": ""})
        longest = len(tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"])
        most = room
    else:
        collator = PromptCollator(tokenizer, len(job.keys), room, scorer.prompts)
        answers = [collator.target_ids(answer) for answer in job.answers]
        config = scorer.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        most = positions - max(len(ids) for ids in answers)
        collator.max_length = min(room, most)
        prompts = collator.prompt_ids([record])[0]
        longest = max(len(ids) for ids in prompts)
    if longest > most:
        raise InputError(f"{job.location}: the question takes {longest} tokens, the reader has "
                         f"room for {most}; shorten it")
    return [[Text(ids, answer) for answer in answers] for ids in prompts]


# ---------------------------------------------------------------- scores

def score_jobs(scorer, jobs, args):
    """The teacher scores of each job, one per key. Raises InputError for one that is no number."""
    families = [make_family(scorer, job, args.key_max_length) if job.keys else [] for job in jobs]
    if scorer.kind == "causal":
        values = score_answers(scorer.model, families, scorer.is_packed)
    else:
        keys = [texts for family in families for texts in family]
        values = score_seq2seq(scorer, keys, args.bf16)
    remaining = iter(values)
    scores = []
    for job, family in zip(jobs, families):
        job_scores = [combine([next(remaining) for _ in texts], texts, args) for texts in family]
        if not all(math.isfinite(score) for score in job_scores):
            raise InputError(f"{job.location}: teacher_scores would be nan or infinite; are the "
                             f"weights of {args.model_name_or_path} whole? Without --bf16 numbers "
                             "are more exact")
        scores.append(job_scores)
    return scores


def combine(values, texts, args):
    """One score of a key's log-likelihoods, one per answer."""
    if args.likelihood == "mean":
        values = [value / len(text.answer) for value, text in zip(values, texts)]
    return max(values) if args.answer == "best" else sum(values) / len(values)


@torch.inference_mode()
def score_seq2seq(scorer, keys, bf16):
    """The log-likelihood of each Text's answer, summed over its tokens, in their order.

    keys: lists of Texts with the same prompt, which is encoded once.
    """
    device = scorer.device
    order = sorted(range(len(keys)), key=lambda i: -len(keys[i][0].prompt))
    lengths = [len(keys[i][0].prompt) for i in order]
    values = [None] * len(keys)
    for first, last in split_by_length(lengths, SEQ2SEQ_TOKENS[device.type]):
        part = [keys[i] for i in order[first:last]]
        texts = [text for key in part for text in key]
        owners = [i for i, key in enumerate(part) for _ in key]  # the prompt of each answer
        prompts = pad_rows([key[0].prompt for key in part], 0).to(device)              # (b, L)
        is_real = pad_rows([[1] * len(key[0].prompt) for key in part], 0).to(device)   # (b, L)
        labels = pad_rows([text.answer for text in texts], -100).to(device)            # (B, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = answer_logits(scorer, prompts, is_real, labels, owners)           # (B, T, V)
        targets = [token for text in texts for token in text.answer]
        part_values = iter(sum_by_text(log_likelihoods(logits[labels != -100], targets), texts))
        for i, key in zip(order[first:last], part):
            values[i] = [next(part_values) for _ in key]
    return [value for key_values in values for value in key_values]


def pad_rows(rows, padding):
    """(rows, longest) of lists of integers, padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def answer_logits(scorer, prompts, is_real, labels, owners):
    """Logits (B, T, V) of the labels (B, T) given prompts (b, L), those that `owners` (B) names."""
    if scorer.kind == "seq2seq":
        return scorer.model(input_ids=prompts[owners], attention_mask=is_real[owners],
                            labels=labels).logits
    model = scorer.model
    memory = model.encode(prompts[:, None], is_real[:, None])  # (b, L) -> (b, 1, L)
    memory = Memory(*(tensor[owners] for tensor in memory))
    return model.decode(model.t5._shift_right(labels), memory)


# ---------------------------------------------------------------- the run

def make_fingerprint(args, world):
    """Return what the scores depend on, on every process: the data, the model, and the flags."""
    fingerprint = []
    if world.is_main:
        name = args.model_name_or_path
        folder = find_model(name)[0]
        paths = model_files(folder)
        if find_base(folder) != folder:
            paths += model_files(find_base(folder))
        if os.path.isfile(name):  # minFiD's, which holds the weights
            paths.append(name)
        flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
        fingerprint = [{**flags, "data": hash_file(args.eval_data),
                        "model": [hash_windows(path, FILE_WINDOWS) for path in paths],
                        "documents": [hash_windows(path, FILE_WINDOWS) for path in args.corpus]}]
    return gather_lists(fingerprint, world)[0]


def write_scored(path, jobs, scores):
    """Writes the records with their teacher scores, one per line."""
    with new_file(path) as file:
        for job, job_scores in zip(jobs, scores):
            record = dict(job.record, teacher_scores=job_scores)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(args):
    transformers.utils.logging.disable_progress_bar()
    world = start_processes(args.gpus, LONG_PATIENCE)  # the fastest waits for the slowest
    check_args(args)
    folder = find_base(find_model(args.model_name_or_path)[0])
    config = read_config(folder, "language")
    trained = read_training_args(args.model_name_or_path)
    is_reader = args.reader or "num_contexts" in trained
    jobs = read_jobs(args, is_reader, world)
    scorer = open_scorer(args, is_reader, trained, config, world)
    journal = Journal(args.output, make_fingerprint(args, world), world)

    # the same batches for any number of processes, so that the numbers are the same, too
    batches = [jobs[first:first + args.batch_size]
               for first in range(0, len(jobs), args.batch_size)]
    remaining = [number for number in range(len(batches)) if number not in journal.done]
    num_keys = sum(len(job.keys) for job in jobs)
    world.log(f"{len(jobs)} questions with {num_keys} keys; {describe(scorer)} on {world.size} x "
              f"{world.device.type}")
    if len(remaining) < len(batches):
        num_left = sum(len(batches[number]) for number in remaining)
        world.log(f"going on from {args.output}.journal.*: {len(jobs) - num_left} questions are "
                  "done")
    own = remaining[world.rank::world.size]
    for number in own:
        check_jobs(scorer, batches[number])
    with progress_bar(total=sum(len(batches[number]) for number in own), desc="scoring",
                      unit=" questions", is_main=world.is_main) as bar:
        for number in own:
            journal.add(number, score_jobs(scorer, batches[number], args))
            bar.update(len(batches[number]))

    done = dict(gather_lists(journal.done.items(), world))
    if world.is_main:
        scores = [job_scores for number in range(len(batches)) for job_scores in done[number]]
        write_scored(args.output, jobs, scores)
    wait_for_all(world)
    journal.remove()
    world.log(f"teacher_scores in {args.output}")


if __name__ == "__main__":
    run_script(main, parse_args())
