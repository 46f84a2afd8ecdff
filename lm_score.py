r"""Score each passage by the likelihood of the answer given it, under a language model.

    python lm_score.py --eval_data train.json --model_name_or_path meta-llama/Llama-2-7b-chat-hf
    torchrun --nproc_per_node=8 lm_score.py --eval_data llm-embedder:qa/msmarco/train.json \
        --save_name llama2-7b
    python lm_score.py --eval_data train.ctxs.jsonl --model_name_or_path OUT --likelihood sum

train.json becomes train.scored.NAME.json, with log p(answer | question, key) for each of a record's
keys as `teacher_scores`, which train_dense.py distils from. The model is a causal language model, a
sequence-to-sequence model, or a reader of train_epoch.py, which then reads one passage at a time.
Sources: LLM-Embedder (arXiv 2310.07554, section 3.2), REPLUG (arXiv 2301.12652, section 4). After a
crash the same command continues where it stopped.
"""
import json
import math
import os
from collections import defaultdict
from typing import NamedTuple

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from model import CLASSES
from reader.borders import chat_frame
from reader.causal import choose_prompts
from reader.causal_lm import open_causal_lm
from reader.open import describe_origin, open_reader_tokenizer, open_with_tokenizer
from reader.predict import add_tokenizer_flags
from reader.scorers import TASK_TEMPLATES, CausalScorer, Job, ReaderScorer, Seq2SeqScorer, Template
from records.corpus import open_corpus
from records.fields import check_types, gold_answers, has_keys, has_text, is_context, labelled_keys
from records.files import check_paths, new_file
from records.hashes import hash_windows, model_files
from records.journal import Journal
from records.questions import read_questions, refuse_table
from records.record_file import hash_record_file
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
    GPUS,
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

FILE_WINDOWS = 256  # parts of a large file whose hashes identify it
# flags that are not in the fingerprint: they do not change the scores, or their files are hashed
UNHASHED_FLAGS = {"gpus", "data_root", "eval_data", "model_name_or_path"}


# ---------------------------------------------------------------- scores

def score_batches(scorer, jobs, batches, journal, args, world):
    """Score this process's share of the batches that are not in the journal. Return the scores of
    all batches, on every process.

    batches: ranges of indices of jobs. Scores do not depend on the number of processes, because the
    batches do not. All jobs are checked before the first is scored. Raise InputError for a job that
    cannot be scored.
    """
    remaining = [number for number in range(len(batches)) if number not in journal.done]
    own = remaining[world.rank::world.size]
    for number in own:
        check_jobs(scorer, [jobs[index] for index in batches[number]])
    scorer.num_truncated = 0  # without those of the check
    with progress_bar(total=sum(len(batches[number]) for number in own), desc="scoring",
                      unit=" questions", is_main=world.is_main) as bar:
        for number in own:
            batch = [jobs[index] for index in batches[number]]
            journal.add(number, score_jobs(scorer, batch, args))
            bar.update(len(batch))
    done = dict(gather_lists(journal.done.items(), world))
    return [done[number] for number in range(len(batches))]


def check_jobs(scorer, jobs):
    """Raise InputError for a job whose question and answers do not fit even without a key.
    Otherwise its keys are truncated until it fits.
    """
    for job in jobs:
        key = ""
        if job.keys and isinstance(job.keys[0], dict):  # passages' titles are not truncated
            key = {"title": max((passage.get("title") or "" for passage in job.keys), key=len),
                   "text": ""}
        if job.keys:
            scorer.texts(job._replace(keys=[key]))


def score_jobs(scorer, jobs, args):
    """Return the teacher scores of each job, one per key. Raise InputError for scores that are not
    finite.
    """
    families = [scorer.texts(job) if job.keys else [] for job in jobs]
    remaining = iter(scorer.score(families))
    scores = []
    for job, family in zip(jobs, families):
        job_scores = []
        for texts in family:  # the texts of one key, one per answer
            values = [next(remaining) for _ in texts]
            if args.likelihood == "mean":
                values = [value / len(text.answer) for value, text in zip(values, texts)]
            job_scores.append(max(values) if args.answer == "best" else sum(values) / len(values))
        if not all(math.isfinite(score) for score in job_scores):
            raise InputError(f"{job.location}: teacher_scores would be nan or infinite; are the "
                             f"weights of {args.model_name_or_path} whole? Without --bf16 numbers "
                             "are more exact")
        scores.append(job_scores)
    return scores


# ---------------------------------------------------------------- records

class Jobs:
    """Hold a Job per question as a sequence; each is made when it is asked for, because a large
    file's records are on disk.
    """

    def __init__(self, questions, corpus, template, args, is_reader):
        self.questions, self.corpus, self.template = questions, corpus, template
        self.args, self.is_reader = args, is_reader

    def __len__(self):
        return len(self.questions)

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index):
        """Return a Job. Raise InputError for a record that cannot be scored."""
        question = self.questions[index].read()
        keys = [key if self.is_reader and is_context(key)
                else format_key(key, self.args.key_template, question.location)
                for key in list_keys(question, self.corpus)]
        if self.is_reader:
            keys = [{"text": key} if isinstance(key, str) else key for key in keys]
        return Job(question.record, question.text, keys, choose_answers(question, self.args.answer),
                   self.template or task_template(question), question.location)


def read_jobs(paths, template, args, is_reader, world):
    """Return the Jobs of the records, and the number of their keys. Raise InputError for a record
    that cannot be scored.
    """
    refuse_table(paths.data, "a table has no keys; run retrieve.py --output FILE.jsonl first")
    corpus = open_corpus(paths.corpus, args.key_template, world) if paths.corpus else None
    jobs = Jobs(read_questions(paths.data), corpus, template, args, is_reader)
    checked = progress_bar(jobs, desc="checking", unit=" questions", is_main=world.is_main)
    return jobs, sum(len(job.keys) for job in checked)


def task_template(question):
    """Return the Template of a record's task. Raise InputError for a task without one."""
    task = question.task or "qa"
    if task not in TASK_TEMPLATES:
        raise InputError(f"{question.location}: there is no template for the task {shorten(task)}, "
                         f"only for {', '.join(TASK_TEMPLATES)}; give one with --template")
    return TASK_TEMPLATES[task]


def list_keys(question, corpus):
    """Return the keys of a record, in the order of its teacher_scores: those of labelled_keys,
    ctxs, or the documents at pos_index and neg_index.

    Raise InputError for a record without any of these fields.
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
        raise InputError(f"{question.location}: keys are given by their indices only; give the "
                         "corpus with --corpus")
    check_indices(question, indices, corpus)
    return [corpus.passage(index) for index in indices]


def choose_answers(question, how):
    """Return the answers to score: all, or only one if `how` is "first". Raise InputError if there
    is no answer.
    """
    answers, target = gold_answers(question.record, question.location)
    own_target = question.record.get("target")
    if isinstance(own_target, str) and has_text(own_target):
        target = own_target
    if how == "first" and target is not None:
        answers = [target]
    answers = answers[:1] if how == "first" else list(dict.fromkeys(answers))
    if not answers:
        raise InputError(f"{question.location}: no answer to score; add 'answers', or drop the "
                         "record")
    return answers


def write_scored(path, jobs, scores):
    """Write the records with their teacher scores, one per line."""
    with new_file(path) as file:
        for job, job_scores in zip(jobs, scores):
            record = dict(job.record, teacher_scores=job_scores)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- set-up

class ScoringPaths(NamedTuple):
    """Hold the paths that the flags resolve to."""
    data: str
    model: str    # folder, file or hub name
    corpus: list
    output: str


def resolve_paths(args):
    """Return the ScoringPaths of the flags. Raise InputError if the output cannot be written."""
    data = resolve_path(args.eval_data, args.data_root)
    model = resolve_path(args.model_name_or_path, args.data_root)
    corpus = [file for path in args.corpus or [] for file in find_files(path, args.data_root)]
    name = args.save_name or os.path.basename(model.rstrip("/"))
    output = collated_path(data, "collate_score", name)
    check_paths([output], [data, model, *corpus])
    return ScoringPaths(data, model, corpus, output)


def parse_template(text):
    """Return the Template of --template, or None. Raise InputError unless it has one {key}, and
    {answer} at its end.
    """
    if text is None:
        return None
    text = text.replace("\\n", "\n")
    if text.count("{key}") != 1:
        raise InputError(f"--template {shorten(text)} must contain {{key}} once, where the passage "
                         "goes")
    if text.count("{answer}") != 1 or not text.endswith("{answer}"):
        raise InputError(f"--template {shorten(text)} must end with {{answer}}: its likelihood is "
                         "computed given all text before it")
    return Template(text)


def open_scorer(args, name, is_reader, trained, config, world):
    """Return the scorer (reader/scorers.py) of the model `name`, given its configuration and
    `trained`, the arguments of its training. Raise InputError for a model that cannot score.
    """
    num_positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    limit = min(args.context_max_length, num_positions)
    prompt_limit = trained.get("max_length") or limit  # used for readers only
    is_t5 = config.model_type in CLASSES
    if args.chat_template and not is_reader and (is_t5 or config.is_encoder_decoder):
        raise InputError(f"--chat_template is for causal language models, but {name} is a "
                         f"{config.model_type} model; leave it out")
    if is_t5:
        model, tokenizer = open_with_tokenizer(name, world.log, args.tokenizer, args.t5_name,
                                               trained=True)
        model.to(world.device).eval()
        scorer = Seq2SeqScorer(model, tokenizer, world.device, limit, args.key_max_length,
                               args.bf16)
        if is_reader:
            model.set_lengths(prompt_limit, None)
            scorer = ReaderScorer(scorer, prompt_limit)
        return scorer

    if is_reader and config.is_encoder_decoder:
        raise InputError(f"--reader: {name} is a {config.model_type} model, but readers are T5 or "
                         "causal language models; leave it out")
    if is_reader:
        tokenizer, origin = open_reader_tokenizer(name, args.tokenizer, args.t5_name)
    else:
        tokenizer = load_tokenizer(args.tokenizer or name, name)
    dtype, reason = torch.bfloat16 if args.bf16 else torch.float32, None
    if config.is_encoder_decoder:
        model = open_seq2seq(name, dtype, world.device)
    else:
        model, reason = open_causal_lm(name, world.device, dtype, None if is_reader else limit)
    if reason:
        world.log(f"note: {name} has {reason}: its texts are padded, which takes longer")
    check_vocabulary(tokenizer, model.get_input_embeddings(), "give the folder that the model came "
                     "with")
    if config.is_encoder_decoder:
        return Seq2SeqScorer(model, tokenizer, world.device, limit, args.key_max_length, args.bf16)
    frame = chat_frame(tokenizer) if args.chat_template and not is_reader else ("", "")
    scorer = CausalScorer(model, tokenizer, limit, args.key_max_length, reason is None, frame)
    if is_reader:
        given = {} if args.chat_template is None else {"chat_template": args.chat_template}
        prompts = choose_prompts(given, trained.get("prompts", {}), name)
        world.log(f"reader {name}: {config.model_type}, {describe_origin(origin)}")
        scorer = ReaderScorer(scorer, prompt_limit, prompts, num_positions)
    return scorer


def open_seq2seq(name, dtype, device):
    """Return a sequence-to-sequence model other than a T5, such as BART. Raise InputError if it
    cannot be read, or has no padding token.
    """
    folder, _ = find_model(name)
    find_weights(folder, required=True)
    with refusing(f"{name}: its weights cannot be read", "fetch the folder again"):
        model, loading = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    check_fit(loading["missing_keys"], loading["mismatched_keys"], loading["unexpected_keys"], name,
              unused_is_fine=True)
    if model.config.pad_token_id is None:
        raise InputError(f"{name}: config.json sets no pad_token_id, which pads the decoder's "
                         "input; add it")
    return model.to(device).eval()


def make_fingerprint(paths, template, args, world):
    """Return what the scores depend on, on every process: the flags, and hashes of the data, the
    model and the corpus.
    """
    fingerprint = []
    if world.is_main:
        folder = find_model(paths.model)[0]
        files = model_files(folder)
        if find_base(folder) != folder:
            files += model_files(find_base(folder))
        if os.path.isfile(paths.model):  # minFiD's file, which holds the weights
            files.append(paths.model)
        flags = {name: value for name, value in vars(args).items() if name not in UNHASHED_FLAGS}
        flags |= {"corpus": paths.corpus, "template": template and template.text}
        fingerprint = [{**flags, "data": hash_record_file(paths.data),
                        "model": [hash_windows(path, FILE_WINDOWS) for path in files],
                        "documents": [hash_windows(path, FILE_WINDOWS) for path in paths.corpus]}]
    return gather_lists(fingerprint, world)[0]


# ---------------------------------------------------------------- flags

def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--eval_data", required=True, metavar="FILE",
        help="records with answers and keys: pos and neg, history, or ctxs; .json or .jsonl, may "
        "end in .gz")
    add("--corpus", nargs="+", metavar="FILE",
        help="documents, only for records with pos_index and neg_index")
    add("--key_template", default="{title} {text}",
        help="text made of a key that is an object, or of a document")
    add("--data_root", default="/data/llm-embedder",
        help="folder that paths of the form llm-embedder:PATH are relative to")
    add("--save_name",
        help="NAME of the output file, train.scored.NAME.json for train.json; default: the last "
        "part of the model's name")
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", default="meta-llama/Llama-2-7b-chat-hf",
        help="causal language model, sequence-to-sequence model, or reader: folder or hub name")
    add("--reader", action="store_true",
        help="use the model as a reader with its own prompts, even if its folder lacks the "
        "args.json of train_epoch.py")
    add_tokenizer_flags(add)
    add("--bf16", action="store_true", help="compute in bfloat16 instead of float32")
    add = parser.add_argument_group("texts").add_argument
    add("--chat_template", default=None, **SWITCH,
        help="make the text before the answer the user's turn of the tokenizer's chat template, "
        "and the answer the assistant's (causal language models); default: for a reader as "
        "trained, else false")
    add("--template",
        help="text with {key}, {query} and, at its end, {answer}; \\n is a line break; a reader "
        "uses its own prompts instead; default: LLM-Embedder's template of the record's task, or "
        "of qa if it has no task")
    add("--context_max_length", type=int, default=1024,
        help="maximum tokens per text, at most the model's positions; keys are truncated to fit")
    add("--key_max_length", type=int, default=512, help="tokens per key, truncated on the right")
    add = parser.add_argument_group("scores").add_argument
    add("--likelihood", choices=["mean", "sum"], default="mean",
        help="log-likelihood of the answer: mean over its tokens (LLM-Embedder), or their sum "
        "(REPLUG)")
    add("--answer", choices=["first", "best", "mean"], default="first",
        help="score of a record with several answers. first: that of its target, else of its first "
        "answer; best: that of the most likely answer; mean: the mean of all scores")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", "--lm_batch_size", type=int, default=8,
        help="questions per batch; the model's batches are sized by tokens to suit the device")
    add("--gpus", **GPUS)
    return parser.parse_args()


def main(args):
    transformers.utils.logging.disable_progress_bar()
    world = start_processes(args.gpus, LONG_PATIENCE)  # the fastest waits for the slowest
    check_at_least(args, {"context_max_length": 2, "key_max_length": 1, "batch_size": 1})
    check_template("key_template", args.key_template, defaultdict(str))
    template, paths = parse_template(args.template), resolve_paths(args)
    config = read_config(find_base(find_model(paths.model)[0]), "language")
    trained = read_training_args(paths.model)
    is_reader = args.reader or "num_contexts" in trained
    jobs, num_keys = read_jobs(paths, template, args, is_reader, world)
    scorer = open_scorer(args, paths.model, is_reader, trained, config, world)
    journal = Journal(paths.output, make_fingerprint(paths, template, args, world), world)

    batches = [range(first, min(first + args.batch_size, len(jobs)))
               for first in range(0, len(jobs), args.batch_size)]
    world.log(f"{len(jobs)} questions with {num_keys} keys; {scorer.name} on {world.size} x "
              f"{world.device.type}")
    num_done = sum(len(batches[number]) for number in journal.done)
    if num_done:
        world.log(f"resuming from {paths.output}.journal.*: {num_done} questions are done")
    scores = score_batches(scorer, jobs, batches, journal, args, world)
    num_truncated = sum(gather_lists([scorer.num_truncated], world))
    if num_truncated:
        flag = "its max_length" if is_reader else "--key_max_length and --context_max_length"
        world.log(f"note: {num_truncated} keys were too long for the model to read to the end "
                  f"({flag}; scripts/make_corpus.py cuts documents into passages)")

    if world.is_main:
        write_scored(paths.output, jobs, [job_scores for batch in scores for job_scores in batch])
    wait_for_all(world)
    journal.remove()
    world.log(f"teacher_scores in {paths.output}")


if __name__ == "__main__":
    run_script(main, parse_args())
