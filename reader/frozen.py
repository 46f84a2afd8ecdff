"""The passages of a frozen retriever for a reader's training: retrieved once, by retrieve.py's own
functions, and kept beside the reader.

OUT.retrieved holds train.jsonl, dev.jsonl and test.jsonl, as retrieve.py --output writes them, and
made_of.json, which tells what they were made of.
"""
import hashlib
import json
import os
import time
from itertools import chain

import transformers

import retrieval.flags
from dense.flags import read_text_settings
from dense.texts import settle_texts
from records.corpus import open_corpus
from records.fields import gold_passages
from records.files import write_json
from records.names import DOCUMENT_ID_NAMES, find_value
from records.questions import Question
from records.reader_records import read_records
from records.reading import read_settings
from retrieval.fingerprint import fingerprint
from retrieval.measures import mark_answers
from retrieval.results import Results, write_contexts
from retrieval.search import search
from utils import InputError, gather_lists, wait_for_all

TASK = "qa"  # whose instructions the retriever gets, where it was trained with some
# what the passages depend on, beside corpus, retriever and questions
SETTINGS = ("retrieval_method", "hits", "query_template", "key_template", "dtype")


# ---------------------------------------------------------------- retrieving

def retrieve_once(args, out, num_retrieved, paths, world):
    """Write OUT.retrieved/NAME.jsonl, the records of each {name: file} with --num_retrieved
    passages of --corpus; what an earlier run has made of the same is kept.

    args: train_epoch.py's flags. Raises InputError.
    """
    folder = retrieved_folder(out)
    records = {}
    for name, path in paths.items():
        records[name] = read_records(path, keep_contexts=1)
        drop_contexts(records[name], path, world.log)
    flags = retrieval_flags(args, num_retrieved)
    corpus = open_corpus(flags.corpus, flags.key_template, world)
    flags.hits = min(flags.hits, len(corpus))
    model = None if args.retriever == "bm25" else args.retriever
    settings = {name: getattr(flags, name) for name in SETTINGS}
    if model is None:
        settings |= {"version": "none", "add_instruction": True, "query_max_length": None,
                     "key_max_length": None, "prompts": None, "bm25_words": flags.bm25_words}
    else:
        texts = settle_texts(model, None, read_text_settings(flags), log=lambda line: None)
        settings |= {"version": texts.version, "add_instruction": texts.add_instruction,
                     "query_max_length": texts.max_lengths["query"],
                     "key_max_length": texts.max_lengths["key"], "prompts": texts.prompts}
    made_of = fingerprint(corpus, model, settings | {"has_ids": corpus.has_ids}, world)

    # the main process decides what is missing
    digests = {name: hash_records(records[name]) for name in paths}
    missing = list_missing(folder, made_of, digests) if world.is_main else []
    missing = gather_lists(missing, world)
    if not missing:
        world.log(f"{folder}: an earlier run's passages, of the same retriever, corpus and "
                  "questions")
        return

    if args.resume and os.path.exists(f"{out}.state") and missing != ["test"]:
        world.log("warning: the retriever's weights, the corpus or the questions have changed "
                  "since the resumed run began")
    transformers.utils.logging.disable_progress_bar()
    start = time.time()
    questions = {name: make_questions(records[name], paths[name]) for name in missing}
    all_questions = list(chain.from_iterable(questions.values()))
    results = search(flags, corpus, all_questions, world)
    if world.is_main:
        keep_results(folder, made_of, digests, questions, results, corpus)
    world.log(f"{folder}: {flags.hits} of {len(corpus):,} documents for each of the "
              f"{len(all_questions)} questions of {', '.join(missing)}, by {args.retriever}: "
              f"{time.time() - start:.1f} s")
    wait_for_all(world)  # for the main process's files


def retrieval_flags(args, num_retrieved):
    """retrieve.py's flags, as if its command line named these. Raises InputError."""
    method = "bm25" if args.retriever == "bm25" else "dense"
    arguments = [f"--retrieval_method={method}", f"--query_encoder={args.retriever}",
                 f"--corpus={args.corpus}", f"--hits={num_retrieved}", f"--task={TASK}",
                 f"--num_workers={args.num_workers}"]
    if args.index:
        arguments.append(f"--index={args.index}")
    flags = retrieval.flags.parse_args("", arguments)
    retrieval.flags.settle_defaults(flags)
    return flags


def make_questions(records, path):
    """The Questions of a reader's records: the text alone, without the chat_history."""
    questions = []
    for record in records:
        questions.append(Question(record, str(record["id"]), record["question"],
                                  record.get("task") or TASK, record["answers"], path))
    return questions


def drop_contexts(records, path, log):
    """Takes the records' own contexts away; logs how many had some."""
    given = sum(bool(record["ctxs"]) for record in records)
    if given:
        log(f"note: {given} of {len(records)} records of {path} have ctxs; the retrieved passages "
            "replace them")
    for record in records:
        record["ctxs"] = []


# ---------------------------------------------------------------- kept results

def retrieved_folder(out):
    return f"{out}.retrieved"


def made_of_path(out):
    return os.path.join(retrieved_folder(out), "made_of.json")


def retrieved_path(out, name):
    """The file that retrieve_once writes for the records of this name."""
    return os.path.join(retrieved_folder(out), f"{name}.jsonl")


def hash_records(records):
    """A hash of records, all fields included."""
    digest = hashlib.blake2b(digest_size=12)
    for record in records:
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()


def read_kept(folder, made_of):
    """{name: hash of its records} of the files that the folder holds, made of this; {} if it was
    made of anything else.

    Raises InputError for a folder that holds files of others.
    """
    given = read_settings(os.path.join(folder, "made_of.json"))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "records" not in given and any(not name.startswith("made_of.json") for name in names):
        raise InputError(f"{folder}: holds files that no run has written, such as {min(names)}; "
                         "they are not touched: choose another name for the reader")
    kept = given.pop("records", None)
    return kept if given == made_of and isinstance(kept, dict) else {}


def list_missing(folder, made_of, digests):
    """The names of digests, {name: hash of its records}, whose file has yet to be made of these."""
    kept = read_kept(folder, made_of)
    return [name for name, digest in digests.items() if kept.get(name) != digest
            or not os.path.exists(os.path.join(folder, f"{name}.jsonl"))]


def keep_results(folder, made_of, digests, questions, results, corpus):
    """Writes the file of each name, {name: its questions}, whose results follow one another.

    made_of.json lists a file from when it is whole until it is written anew.
    """
    kept = {name: digest for name, digest in read_kept(folder, made_of).items()
            if name not in questions}
    path = os.path.join(folder, "made_of.json")
    write_json(path, made_of | {"records": kept})
    first = 0
    for name in questions:
        last = first + len(questions[name])
        part = Results(results.indices[first:last], results.scores[first:last])
        marks = mark_answers(questions[name], part, corpus)
        write_contexts(os.path.join(folder, f"{name}.jsonl"), questions[name], part, corpus, marks)
        kept[name] = digests[name]
        write_json(path, made_of | {"records": kept})
        first = last


# ---------------------------------------------------------------- the reader's records

def put_gold_first(out, records, num_contexts, path, log):
    """Puts the ground-truth passages of training records before the retrieved ones, without
    duplicates, num_contexts in all; logs how many records have none, or more than that.
    """
    by_id = read_settings(made_of_path(out))["has_ids"]
    without, too_many = 0, 0
    for record in records:
        gold = gold_passages(record)
        without += not gold
        too_many += len(gold) > num_contexts
        record["ctxs"] = merge_passages(gold, record["ctxs"], by_id)[:num_contexts]
    if without:
        log(f"note: {without} of {len(records)} records of {path} have no 'passage'; "
            "they are trained on with retrieved passages alone")
    if too_many:
        log(f"note: {too_many} of {len(records)} records of {path} have more than "
            f"{num_contexts} ground-truth passages; the first {num_contexts} are read "
            "(--num_retrieved)")


def merge_passages(gold, retrieved, by_id):
    """Ground-truth passages, then the retrieved ones, each passage once.

    One that was retrieved, too, is taken as the corpus has it, and one without a title gets an
    empty one, as documents do: in training and evaluation passages must look alike.
    """
    passages = []
    for passage in gold:
        passage = passage | {"title": passage.get("title") or ""}
        passage = find_passage(passage, retrieved, by_id) or passage
        if not find_passage(passage, passages, by_id):
            passages.append(passage)
    for passage in retrieved:
        if not find_passage(passage, passages, by_id):
            passages.append(passage)
    return passages


def find_passage(passage, others, by_id):
    """Return the first of others that is this passage, or None: one with its id or its text, white
    space apart. Not by_id: the corpus's ids are but positions.
    """
    identifier = find_value(passage, DOCUMENT_ID_NAMES) if by_id else None
    for other in others:
        has_same_id = (identifier is not None
                       and str(identifier) == str(find_value(other, DOCUMENT_ID_NAMES)))
        if has_same_id or passage["text"].split() == other["text"].split():
            return other
    return None


def note_reach(records, path, log):
    """Logs the share of questions that the retrieved passages can answer."""
    scored = [record for record in records if record["answers"]]
    reached = sum(any(context.get("has_answer") for context in record["ctxs"]) for record in scored)
    log(f"{100 * reached / max(len(scored), 1):.2f} % of the questions of {path} "
        f"({reached}/{len(scored)}) have an answer among the retrieved passages")
