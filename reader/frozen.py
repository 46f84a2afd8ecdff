"""The passages of a frozen retriever for a reader's training, retrieved once and kept next to the
reader.

OUT.retrieved holds train.jsonl, dev.jsonl and test.jsonl, in the form of retrieve.py --output, and
made_of.json, which lists what they were made of.
"""
import hashlib
import json
import os
import time
from dataclasses import replace
from functools import partial
from itertools import chain

import transformers

from dense.texts import TEMPLATES, TextSettings, read_trained_flags, settle_texts
from records.corpus import open_corpus
from records.fields import gold_passages
from records.files import write_json
from records.names import DOCUMENT_ID_NAMES, find_value
from records.questions import Question
from records.reader_records import change_contexts, read_facts, read_records
from records.reading import read_settings
from retrieval.fingerprint import fingerprint
from retrieval.measures import mark_answers
from retrieval.results import Results, write_contexts
from retrieval.search import DenseSettings, SearchSettings, search
from utils import InputError, gather_lists, wait_for_all

TASK = "qa"  # the task whose instructions are used, if the retriever was trained with instructions


# ---------------------------------------------------------------- retrieving

def retrieve_once(out, paths, retriever, corpus_file, num_retrieved, world, *, index=None,
                  num_workers=0, resumes=False):
    """Write OUT.retrieved/NAME.jsonl for each {name: file}: its records with retrieved passages.

    Files that an earlier run made in the same way are kept. retriever: a folder, hub name, or bm25.
    resumes: the run continues from OUT.state. Raises InputError.
    """
    folder = retrieved_folder(out)
    records = {}
    for name, path in paths.items():
        records[name] = drop_contexts(read_records(path), path, world.log)
    settings = frozen_settings(retriever, corpus_file, num_retrieved, index, num_workers)
    corpus = open_corpus([corpus_file], settings.key_template, world)
    settings = replace(settings, hits=min(settings.hits, len(corpus)))
    made_of = describe_passages(settings, corpus, world)

    # the main process decides what is missing
    digests = {name: hash_records(records[name]) for name in paths}
    missing = list_missing(folder, made_of, digests) if world.is_main else []
    missing = gather_lists(missing, world)
    if not missing:
        world.log(f"{folder}: an earlier run's passages, of the same retriever, corpus and "
                  "questions")
        return

    if resumes and os.path.exists(f"{out}.state") and missing != ["test"]:
        world.log("warning: the retriever's weights, the corpus or the questions have changed "
                  "since the resumed run began")
    transformers.utils.logging.disable_progress_bar()
    start = time.time()
    questions = {name: make_questions(records[name], paths[name]) for name in missing}
    all_questions = list(chain.from_iterable(questions.values()))
    results = search(settings, corpus, all_questions, world)
    if world.is_main:
        keep_results(folder, made_of, digests, questions, results, corpus)
    world.log(f"{folder}: {settings.hits} of {len(corpus):,} documents for each of the "
              f"{len(all_questions)} questions of {', '.join(missing)}, by {retriever}: "
              f"{time.time() - start:.1f} s")
    wait_for_all(world)  # until the main process has written the files


def frozen_settings(retriever, corpus_file, num_retrieved, index, num_workers):
    """Return the SearchSettings of a frozen retriever: retrieve.py's defaults, with the templates
    that the retriever was trained with.
    """
    method = "bm25" if retriever == "bm25" else "dense"
    trained = {} if method == "bm25" else read_trained_flags(retriever)
    templates = {name: trained.get(name, default) for name, default in TEMPLATES.items()}
    dense = DenseSettings(retriever, texts=TextSettings(**templates), num_workers=num_workers)
    return SearchSettings(method, num_retrieved, index=index or f"{corpus_file}.{method}-index",
                          dense=dense, task=TASK, key_template=templates["key_template"])


def describe_passages(settings, corpus, world):
    """Return {name: value} of all that the passages depend on, except the questions."""
    dense, model = settings.dense, None
    made_of = {"retrieval_method": settings.method, "hits": settings.hits, "version": "none",
               "add_instruction": True, "query_template": dense.texts.query_template,
               "query_max_length": None, "key_template": dense.texts.key_template,
               "key_max_length": None, "dtype": dense.dtype, "prompts": None}
    if settings.method == "bm25":
        made_of["bm25_words"] = settings.bm25.bm25_words
    else:
        model = dense.query_encoder
        texts = settle_texts(model, None, dense.texts, log=lambda line: None)
        made_of |= {"version": texts.version, "add_instruction": texts.add_instruction,
                    "query_max_length": texts.max_lengths["query"],
                    "key_max_length": texts.max_lengths["key"], "prompts": texts.prompts}
    return fingerprint(corpus, model, made_of | {"has_ids": corpus.has_ids}, world)


def make_questions(records, path):
    """Return the Questions of a reader's records: their text, without the chat_history."""
    return [Question(record, str(record["id"]), record["question"], record.get("task") or TASK,
                     record["answers"], path) for record in records]


def drop_contexts(records, path, log):
    """Return the records without their own contexts, and log how many records had some."""
    given = sum(facts["num_contexts"] > 0 for facts in read_facts(records))
    if given:
        log(f"note: {given} of {len(records)} records of {path} have ctxs; the retrieved passages "
            "replace them")
    return [record | {"ctxs": []} for record in records]


# ---------------------------------------------------------------- kept results

def retrieved_folder(out):
    """Return the folder of a reader's retrieved passages."""
    return f"{out}.retrieved"


def retrieved_path(out, name):
    """Return the file that retrieve_once writes for the records of this name."""
    return os.path.join(retrieved_folder(out), f"{name}.jsonl")


def hash_records(records):
    """Return a hash of records with all their fields."""
    digest = hashlib.blake2b(digest_size=12)
    for record in records:
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()


def read_kept(folder, made_of):
    """Return {name: hash of its records} of files that were made of `made_of`, else {}.

    Raises InputError if the folder holds files that no run has written.
    """
    given = read_settings(os.path.join(folder, "made_of.json"))
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if "records" not in given and any(not name.startswith("made_of.json") for name in names):
        raise InputError(f"{folder}: holds files that no run has written, such as {min(names)}; "
                         "they are left alone: choose another name for the reader")
    kept = given.pop("records", None)
    return kept if given == made_of and isinstance(kept, dict) else {}


def list_missing(folder, made_of, digests):
    """Return the names whose file has to be made. digests: {name: hash of its records}."""
    kept = read_kept(folder, made_of)
    return [name for name, digest in digests.items() if kept.get(name) != digest
            or not os.path.exists(os.path.join(folder, f"{name}.jsonl"))]


def keep_results(folder, made_of, digests, questions, results, corpus):
    """Write the file of each name. questions: {name: its questions}, in the order of the results.

    made_of.json lists a file only while it is whole, so a file is removed from the list before it
    is written again.
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
    """Put the ground-truth passages of training records before the retrieved ones, without
    duplicates, and keep num_contexts passages.

    Logs how many records of the file have no such passage, or more than num_contexts of them.
    """
    by_id = read_settings(os.path.join(retrieved_folder(out), "made_of.json"))["has_ids"]
    counts = [facts["num_gold"] for facts in read_facts(records)]
    without, too_many = counts.count(0), sum(count > num_contexts for count in counts)
    change_contexts(records, partial(choose_passages, num_contexts=num_contexts, by_id=by_id))
    if without:
        log(f"note: {without} of {len(records)} records of {path} have no 'passage'; they are "
            "trained on with retrieved passages alone")
    if too_many:
        log(f"note: {too_many} of {len(records)} records of {path} have more than {num_contexts} "
            f"ground-truth passages; the first {num_contexts} are read (--num_retrieved)")


def choose_passages(record, num_contexts, by_id):
    """Return the first num_contexts of a record's ground-truth and retrieved passages."""
    return merge_passages(gold_passages(record), record["ctxs"], by_id)[:num_contexts]


def merge_passages(gold, retrieved, by_id):
    """Return the ground-truth passages, then the retrieved ones, each passage once.

    Passages must look the same in training and evaluation. So a ground-truth passage that was also
    retrieved is replaced by the corpus's form, and a missing title by an empty one.
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
    """Return the first of `others` with the same id, or the same words, as the passage, or None.

    by_id: False if the corpus has no ids of its own, so that ids are not compared.
    """
    identifier = find_value(passage, DOCUMENT_ID_NAMES) if by_id else None
    for other in others:
        has_same_id = (identifier is not None
                       and str(identifier) == str(find_value(other, DOCUMENT_ID_NAMES)))
        if has_same_id or passage["text"].split() == other["text"].split():
            return other
    return None


def note_reach(records, path, log):
    """Log the share of questions that have an answer among the retrieved passages."""
    scored = [record for record in records if record["answers"]]
    reached = sum(any(context.get("has_answer") for context in record["ctxs"]) for record in scored)
    log(f"{100 * reached / max(len(scored), 1):.2f} % of the questions of {path} "
        f"({reached}/{len(scored)}) have an answer among the retrieved passages")
