"""Training groups of a retriever: one query, its positive, its negatives, from any of the field's files.

LLM-Embedder's records (query, pos, neg, history, teacher_scores, task), DPR's (question, positive_ctxs, hard_negative_ctxs,
negative_ctxs), or a corpus, queries and TREC or BEIR qrels with Trove's filters. A key is a text, a dictionary for the key
template, or the number of a document whose text stays in its file.
"""
import argparse
import hashlib
import math
import random
import re
from typing import NamedTuple

import numpy as np
import torch

from corpus import format_key
from data import check_types, read_json
from qrels import merge_qrels
from utils import InputError

# what the models of these names were trained with; "" is for tasks not named
INSTRUCTIONS = {
    "none": {},
    "bge": {"": ("Represent this sentence for searching relevant passages: ", "")},
    "e5": {"": ("query: ", "passage: ")},
    "llm-embedder": {
        "qa": ("Represent this query for retrieving relevant documents: ", "Represent this document for retrieval: "),
        "convsearch": ("Encode this query and context for searching relevant passages: ", "Encode this passage for retrieval: "),
        "chat": ("Embed this dialogue to find useful historical dialogues: ", "Embed this historical dialogue for retrieval: "),
        "lrlm": ("Embed this text chunk for finding useful historical chunks: ",
                 "Embed this historical text chunk for retrieval: "),
        "icl": ("Convert this example into vector to look for useful examples: ",
                "Convert this example into vector for retrieval: "),
        "tool": ("Transform this user request for fetching helpful tool descriptions: ",
                 "Transform this tool description for retrieval: ")}}


def named_version(name):
    """Whose instructions a model was trained with, by its name or the folder that the hub keeps it in; none if that does not tell."""
    parts = name.rstrip("/").lower().split("/")
    name = next((part for part in parts if part.startswith("models--")), parts[-1])
    found = re.search(r"(?:^|[-_.])(llm-embedder|bge|e5)(?![a-z0-9]|-m3|-mistral)", name)
    return found[1] if found else "none"


# what LLM-Embedder sets per task with --use_train_config (its TASK_CONFIG)
TRAIN_CONFIG = {
    "qa": {"contrastive_weight": 0, "stable_distill": True}, "convsearch": {"distill_weight": 0}, "tool": {"distill_weight": 0},
    "icl": {"select_positive": "random", "contrastive_weight": 0, "stable_distill": True},
    "chat": {"select_positive": "teacher", "contrastive_weight": 0, "teacher_temperature": 0.1},
    "lrlm": {"select_positive": "teacher", "contrastive_weight": 0, "teacher_temperature": 0.1, "teacher_scores_margin": 0.1,
             "max_sample_num": 10000}}
GROUP_FLAGS = {"select_positive": "first", "select_negative": "random", "stable_distill": False, "teacher_scores_margin": None,
               "teacher_scores_min": None, "max_sample_num": None}


class Example(NamedTuple):
    """A query with its pools of keys; scores, one per key, positives first, are a teacher's, or labels if there is no positive."""
    query: str
    pos: list
    neg: list
    scores: object = None
    task: str = ""
    place: str = ""


# ---------------------------------------------------------------------------------------------------- qrels

def document_numbers(qrels, corpus, queries):
    """The qrels with documents as numbers; InputError for a query or document that is not there."""
    pairs = [(query, document) for query, own in qrels.items() for document in own]
    numbers = dict(zip(pairs, corpus.numbers([document for _, document in pairs])))
    for (query, document), number in numbers.items():
        if query not in queries:
            raise InputError(f"the qrels name query {query!r}, which is in none of the query files; give its file with --queries")
        if number < 0:
            raise InputError(f"the qrels name document {document!r} (query {query!r}), which the corpus does not have; "
                             "give its file with --corpus, or mend the qrels")
    return {query: {numbers[query, document]: score for document, score in own.items()} for query, own in qrels.items()}


def qrels_examples(corpus, queries, positives, negatives, graded, group_size):
    """Examples from qrels: binary (a document that is both counts as positive) or, graded, all labelled documents of a query."""
    if graded:
        graded, examples = document_numbers(graded, corpus, queries), []
        for query, own in graded.items():
            if len(own) < group_size:
                raise InputError(f"query {query!r} has {len(own)} labelled documents, --group_size wants {group_size}; lower "
                                 "it, or leave such queries out with query_subset")
            examples.append(Example(queries[query], [], list(own), list(own.values()), "", f"query {query}"))
        return examples
    positives, negatives = (document_numbers(qrels, corpus, queries) for qrels in (positives, negatives))
    return [Example(queries[query], list(own), [d for d in negatives.get(query, ()) if d not in own], None, "", f"query {query}")
            for query, own in positives.items()]


# ---------------------------------------------------------------------------------------------------- records

def read_examples(path):
    """Examples of a file of LLM-Embedder's or DPR's records; InputError with the place for a field that is wrong."""
    examples = []
    for record, place in read_json(path):
        query = record.get("query", record.get("question")) if isinstance(record, dict) else None
        if not isinstance(query, str):
            raise InputError(f"{place}: no 'query' (or 'question') text")
        check_types(record, place)
        check_types(record, place, ["history"])
        if record.get("positive_ctxs") is not None:
            pos, neg = record["positive_ctxs"][:1], record.get("hard_negative_ctxs") or record.get("negative_ctxs") or []
            scores = None
        elif record.get("history") is not None:
            pos, neg, scores = [], record["history"], record.get("teacher_scores")
        else:
            pos, neg, scores = (record.get(key) for key in ("pos", "neg", "teacher_scores"))
        pos, neg = list(pos or []), list(neg or [])
        if not all(isinstance(key, str) or isinstance(key, dict) and isinstance(key.get("text"), str) for key in pos + neg):
            raise InputError(f"{place}: every positive and negative must be a text or an object with a 'text'")
        if scores is not None and len(scores) != len(pos) + len(neg):
            raise InputError(f"{place}: {len(scores)} teacher_scores for {len(pos)} positives and {len(neg)} negatives (or "
                             "history); one per key is wanted, positives first")
        examples.append(Example(query, pos, neg, scores, record.get("task") or "", place))
    if not examples:
        raise InputError(f"{path}: holds no records")
    return examples


def filter_examples(examples, group_size, select_positive, margin=None, least=None, in_batch_only=False):
    """(examples kept, {reason: (count, first place)}): LLM-Embedder's rules of what can be trained on."""
    kept, dropped = [], {}
    for example in examples:
        reason = None
        from_negatives = select_positive == "teacher" and bool(example.scores)  # the positive may be one of them
        if not example.pos and not (from_negatives and example.neg):
            reason = "no positive"
        elif group_size > 1 and not in_batch_only and len(example.neg) < (1 if example.pos else 2):
            reason = "no negative"
        elif example.scores and least is not None and max(example.scores) < least:
            reason = "highest teacher score below --teacher_scores_min"
        elif example.scores and margin is not None and max(example.scores) - min(example.scores) < margin:
            reason = "teacher scores closer than --teacher_scores_margin"
        if reason:
            dropped[reason] = (dropped.get(reason, (0,))[0] + 1, dropped.get(reason, (0, example.place))[1])
        else:
            kept.append(example)
    return kept, dropped


def choose_group(example, group_size, select_positive, select_negative, stable, rng):
    """(keys, teacher scores or None) of one visit: the positive and group_size - 1 negatives, by LLM-Embedder's rules.

    select_positive: first, random, teacher (the highest score of all keys), teacher-pos (of the positives). select_negative:
    first, random, teacher+ (highest scores), teacher- (lowest). Scarce negatives are repeated; `stable` sorts the negatives by
    falling score. Without positives and with labels only (graded) a random group is taken.
    """
    pos, neg, scores = example.pos, list(range(len(example.neg))), example.scores
    if select_positive == "graded":
        chosen = rng.sample(neg, group_size)
        return [example.neg[i] for i in chosen], [scores[i] for i in chosen]
    if select_positive == "random":
        first = rng.randrange(len(pos))
    elif select_positive.startswith("teacher") and scores is not None:
        first = max(range(len(pos) if select_positive == "teacher-pos" else len(scores)), key=lambda i: scores[i])
    else:
        first = 0
    positive = pos[first] if first < len(pos) else example.neg[neg.pop(first - len(pos))]
    negative_scores = None if scores is None else scores[len(pos):]
    if neg:
        neg = neg * math.ceil((group_size - 1) / len(neg)) if len(neg) < group_size - 1 else neg
        if scores is not None and select_negative in ("teacher+", "teacher-"):
            neg = sorted(neg, key=lambda i: negative_scores[i], reverse=select_negative == "teacher+")
        elif select_negative != "first":
            rng.shuffle(neg)
        neg = neg[:group_size - 1]
    if scores is None:
        return [positive] + [example.neg[i] for i in neg], None
    if stable:
        neg.sort(key=lambda i: negative_scores[i], reverse=True)
    return [positive] + [example.neg[i] for i in neg], [scores[first]] + [negative_scores[i] for i in neg]


def read_training(args, corpus, queries, say):
    """(examples, group settings per example, examples per dataset, loss settings per task), with what was dropped said."""
    if args.train_data:
        datasets = [read_examples(path) for path in args.train_data]
    else:
        datasets = [qrels_examples(corpus, queries, merge_qrels(args.positives, args.seed), merge_qrels(args.negatives, args.seed),
                                   merge_qrels(args.graded, args.seed), args.train_group_size)]
    examples, settings, sizes, by_task = [], [], [], {}
    only = not args.train_data and not args.negatives and not args.graded  # in-batch negatives alone
    for number, own in enumerate(datasets):
        task = own[0].task if own else ""
        if args.inbatch_same_dataset is None and args.use_train_config and len({d[0].task for d in datasets}) > 1:
            raise InputError("--use_train_config with several tasks needs --inbatch_same_dataset epoch")
        by_task[task] = task_settings(args, task)
        group = by_task[task]
        if not args.graded:
            own, dropped = filter_examples(own, args.train_group_size, group.select_positive, group.teacher_scores_margin,
                                           group.teacher_scores_min, in_batch_only=only)
            for reason, (count, place) in dropped.items():
                say(f"{count} records dropped: {reason}, first {place}")
        own = own[:group.max_sample_num]
        if not own:
            raise InputError(f"{args.train_data[number] if args.train_data else 'the qrels'}: no example is left to train on")
        needs_teacher = args.loss in ("kl", "fid-kd") or not group.contrastive_weight and not args.loss
        if needs_teacher and not any(example.scores for example in own):
            raise InputError(f"{own[0].place}: without teacher_scores only InfoNCE can be trained; give --loss infonce")
        settings += [{"group_size": 1 if only else args.train_group_size, "select_negative": group.select_negative,
                      "select_positive": "graded" if args.graded else group.select_positive,
                      "stable": group.stable_distill}] * len(own)
        examples += own
        sizes.append(len(own))
        by_task |= {example.task: group for example in own}
    return examples, settings, sizes, by_task


def task_settings(args, task):
    """The flags of a task: with --use_train_config LLM-Embedder's, its defaults for the selection, else those given."""
    own = dict(vars(args), loss="kl" if args.graded and not args.loss else args.loss)
    if args.use_train_config:
        own |= GROUP_FLAGS | TRAIN_CONFIG.get(task, {})
    return argparse.Namespace(**own)


# ---------------------------------------------------------------------------------------------------- batches

class GroupSet(torch.utils.data.Dataset):
    """The visits of examples: each epoch draws anew, the same whatever the number of processes."""

    def __init__(self, examples, settings, seed):
        self.examples, self.settings, self.seed, self.epoch = examples, settings, seed, 0  # settings: one dictionary per example

    def __getitem__(self, key):
        place, counted = key
        rng = random.Random(f"{self.seed}/{self.epoch}/{place}")
        return place, counted, self.examples[place], *choose_group(self.examples[place], rng=rng, **self.settings[place])


class GroupCollator:
    """Turns visits into {places, counted, task, queries, keys (Q * G) token ids, teacher (Q, G), nan where none, identities}.

    For a ranker `pairs` (Q * G) of (ids, types) take the place of queries and keys.
    """

    def __init__(self, tokenizer, args, corpus=None, instructions=None):
        self.tokenizer, self.args, self.corpus, self.instructions = tokenizer, args, corpus, instructions or {}

    def __call__(self, visits):
        texts = [[self.key_text(key) for key in keys] for _, _, _, keys, _ in visits]
        batch = {"places": [place for place, *_ in visits], "counted": visits[0][1], "task": visits[0][2].task,
                 "teacher": torch.tensor([row or [math.nan] * len(own) for own, (*_, row) in zip(texts, visits)]),
                 "identities": torch.tensor([identity(key, text) for own, (_, _, _, keys, _) in zip(texts, visits)
                                             for key, text in zip(keys, own)])}
        tasks = [example.task for _, _, example, _, _ in visits]
        if self.args.ranker:
            batch["pairs"] = self.pairs([example.query for _, _, example, _, _ in visits for _ in texts[0]], sum(texts, []))
        else:
            batch["queries"] = self.queries([example.query for _, _, example, _, _ in visits], tasks)
            batch["keys"] = self.keys(sum(texts, []), [task for own, task in zip(texts, tasks) for _ in own])
        return batch

    def instruction(self, task):
        """What goes before (queries, keys) of a task; records without a task have none."""
        return self.instructions.get(task, self.instructions.get("", ("", ""))) if task else ("", "")

    def queries(self, texts, tasks):
        """Token ids of queries, each with its task's instruction."""
        texts = [self.instruction(task)[0] + self.args.query_template.format(query=text) for text, task in zip(texts, tasks)]
        return tokenize(self.tokenizer, texts, self.args.query_max_length, self.args.pooling_method == "last")

    def keys(self, texts, tasks):
        """Token ids of key texts, each with its task's instruction."""
        texts = [self.instruction(task)[1] + text for text, task in zip(texts, tasks)]
        return tokenize(self.tokenizer, texts, self.args.key_max_length, self.args.pooling_method == "last")

    def pairs(self, queries, keys):
        """(token ids, token types) of query and key pairs, for a ranker."""
        rows = self.tokenizer(queries, keys, truncation=True, return_token_type_ids=True,
                              max_length=self.args.query_max_length + self.args.key_max_length)
        return list(zip(rows["input_ids"], rows["token_type_ids"]))

    def key_text(self, key):
        """The text of a key: a document of the corpus by its number, a text, or columns."""
        return self.corpus.text(key) if isinstance(key, int) else format_key(key, self.args.key_template)


def identity(key, text):
    """A 64-bit number that equal documents share: of the id where a key has one, else of the text."""
    name = f"number {key}" if isinstance(key, int) else key.get("passage_id", text) if isinstance(key, dict) else text
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "little", signed=True)


def tokenize(tokenizer, texts, max_length, append_eos=False):
    """Lists of token ids with special tokens, cut at the right; append_eos ends each text with the end-of-sequence token."""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    rows = tokenizer(texts, truncation=True, max_length=max_length - append_eos)["input_ids"]
    return [row + [eos] if row[-1:] != [eos] else row for row in rows] if append_eos else rows


def plan_batches(sizes, epoch, seed, shuffle, batch_size, accumulation, same_dataset=None, rank=0, world_size=1):
    """This process's part of an epoch: [update][micro-batch][(place, counted)], the micro-batches of all processes being one batch.

    sizes: examples per dataset, numbered one after another. same_dataset: None mixes them; epoch: each batch is of one dataset,
    and each example comes once; random: each batch's dataset is drawn by size and its examples without replacement.
    The last, smaller batch of a dataset is kept; a process left without an example there joins with one that is not counted.
    """
    rng, whole, starts = np.random.default_rng([seed, epoch]), batch_size * world_size, np.cumsum([0, *sizes])
    datasets = [np.arange(a, b) for a, b in zip(starts, starts[1:])] if same_dataset else [np.arange(starts[-1])]
    if same_dataset == "random":
        drawn = rng.choice(len(sizes), math.ceil(starts[-1] / whole), p=np.array(sizes) / starts[-1])
        batches = [rng.permutation(datasets[i])[:whole] for i in drawn]
    else:
        orders = [rng.permutation(dataset) if shuffle else dataset for dataset in datasets]
        batches = [order[i:i + whole] for order in orders for i in range(0, len(order), whole)]
        batches = [batches[i] for i in rng.permutation(len(batches))] if same_dataset and shuffle else batches
    own = [[(int(place), True) for place in batch[rank::world_size]] or [(int(batch[0]), False)] for batch in batches]
    return [own[i:i + accumulation] for i in range(0, len(own), accumulation)]
