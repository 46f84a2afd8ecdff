"""From examples to batches: the plan of an epoch over processes and datasets, the visits it makes,
and their token ids.
"""
import hashlib
import math
import random
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from dense.examples import Example
from dense.training_data import choose_group
from records.templates import format_key
from utils import InputError

# ---------------------------------------------------------------- plan

def plan_batches(sizes, epoch, seed, shuffle, batch_size, accumulation, same_dataset=None, rank=0,
                 world_size=1):
    """This process's part of an epoch, [update][micro-batch][(example index, is_real)].

    The micro-batches of all processes make up one batch of batch_size * world_size examples, drawn
    the same way for any number of processes; a process takes every world_size-th. The last, smaller
    batch is kept; a process that gets no example of it joins in with one that is not real.

    sizes         examples per dataset; example indices run through all datasets
    same_dataset  None mixes the datasets; epoch: each batch is of one dataset, and each example
                  comes once; random: each batch's dataset is drawn by its size, its examples
                  without replacement
    """
    rng = np.random.default_rng([seed, epoch])
    whole_size = batch_size * world_size
    starts = np.cumsum([0, *sizes])
    if same_dataset is None:
        datasets = [np.arange(starts[-1])]
    else:
        datasets = [np.arange(start, end) for start, end in zip(starts, starts[1:])]

    if same_dataset == "random":
        batches = draw_batches(datasets, whole_size, rng)
    else:
        batches = cut_batches(datasets, whole_size, shuffle, rng)
        if same_dataset and shuffle:
            batches = [batches[index] for index in rng.permutation(len(batches))]

    micro_batches = []
    for batch in batches:
        share = [(int(index), True) for index in batch[rank::world_size]]
        micro_batches.append(share or [(int(batch[0]), False)])
    return [micro_batches[first:first + accumulation]
            for first in range(0, len(micro_batches), accumulation)]


def draw_batches(datasets, size, rng):
    """As many batches as an epoch has, each of a dataset drawn in proportion to its size."""
    sizes = np.array([len(dataset) for dataset in datasets])
    count = math.ceil(sizes.sum() / size)
    drawn = rng.choice(len(datasets), count, p=sizes / sizes.sum())
    return [rng.permutation(datasets[index])[:size] for index in drawn]


def cut_batches(datasets, size, shuffle, rng):
    """Batches of one dataset after another, each example once."""
    batches = []
    for dataset in datasets:
        order = rng.permutation(dataset) if shuffle else dataset
        batches += [order[first:first + size] for first in range(0, len(order), size)]
    return batches


# ---------------------------------------------------------------- visits

class Visit(NamedTuple):
    """An example as one epoch sees it, with the group of keys chosen for it."""
    index: int
    is_real: bool           # False: it is there only so that this process takes part in the batch
    example: Example
    keys: list
    teacher_scores: list    # one per key, or None


class GroupSet(torch.utils.data.Dataset):
    """The visits of examples; each epoch draws groups anew, the same ones for any number of
    processes.
    """

    def __init__(self, examples, group_rules, seed):
        self.examples = examples
        self.group_rules = group_rules
        self.seed = seed
        self.epoch = 0

    def name_examples(self, indices):
        """Return the locations of examples, for an error message."""
        return ", ".join(self.examples[index].location for index in indices)

    def __getitem__(self, planned):
        """The Visit of an entry of the plan, (index, is_real)."""
        index, is_real = planned
        example = self.examples[index]
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
        keys, teacher_scores = choose_group(example, self.group_rules[index], rng)
        return Visit(index, is_real, example, keys, teacher_scores)


# ---------------------------------------------------------------- collator

class GroupCollator:
    """Turns B visits, each with a group of keys, into a batch of B queries and K keys:

    indices     of the examples (B)
    is_real     False if this process only takes part in the batch
    task        of the first example, whose flags hold for the batch
    queries     token ids of B queries
    keys        token ids of K keys, group after group; for a ranker `pairs` (K) of (token ids,
                types) replace queries and keys
    sizes       of the groups (B) int64, with sum K; G, or 1 for an example without negatives
    teacher     scores (B, G), G being the largest size; nan in the rows of examples without any,
                and after the keys of a smaller group
    identities  (K) int64, equal for equal documents
    positives   the identities of each query's positives (B lists), with --mask_duplicates
    """

    def __init__(self, texts, corpus=None, mask_duplicates=False):
        """Set up a collator for these Texts (dense/texts.py)."""
        self.texts = texts
        self.settings = texts.settings
        self.corpus = corpus
        self.mask_duplicates = mask_duplicates

    def __call__(self, visits):
        queries = [visit.example.query for visit in visits]
        tasks = [visit.example.task for visit in visits]
        keys = list(chain.from_iterable(visit.keys for visit in visits))  # (K)
        key_texts = [self.key_text(key) for key in keys]
        sizes = [len(visit.keys) for visit in visits]
        teacher = []
        for visit in visits:
            scores = visit.teacher_scores or [math.nan] * len(visit.keys)
            teacher.append(scores + [math.nan] * (max(sizes) - len(scores)))
        batch = {
            "indices": [visit.index for visit in visits],
            "is_real": visits[0].is_real,
            "task": tasks[0],
            "sizes": torch.tensor(sizes),
            "teacher": torch.tensor(teacher, dtype=torch.float32),
            "identities": torch.tensor([identity(text) for text in key_texts]),
        }
        if self.mask_duplicates:
            batch["positives"] = [self.positives(visit) for visit in visits]
        if self.settings.ranker:
            batch["pairs"] = self.pairs(repeat_each(queries, sizes), key_texts)
        else:
            instructions = [visit.example.instruction for visit in visits]
            batch["queries"] = self.queries(queries, tasks, instructions)
            batch["keys"] = self.keys(key_texts, repeat_each(tasks, sizes))
        return batch

    def positives(self, visit):
        """Return the identities of a visit's positive and of all that its example has."""
        return [identity(self.key_text(key)) for key in (visit.keys[0], *visit.example.pos)]

    def instruction(self, task):
        """Return (the text before queries, the text before keys) of a task."""
        return self.texts.instruction(task)

    def queries(self, texts, tasks, instructions=None):
        """Return token ids of queries, each in the query template and after the record's own
        instruction, if that is not None, or its task's.
        """
        prompted = []
        for text, task, own in zip(texts, tasks, instructions or [None] * len(texts)):
            before_query = self.instruction(task)[0] if own is None else own
            prompted.append(before_query + self.settings.query_template.format(query=text))
        return self.tokenize(prompted, "query")

    def keys(self, texts, tasks):
        """Return token ids of key texts, each with its task's instruction."""
        prompted = []
        for text, task in zip(texts, tasks):
            _, before_key = self.instruction(task)
            prompted.append(before_key + text)
        return self.tokenize(prompted, "key")

    def tokenize(self, texts, role):
        """Return token ids of texts by the tokenizer of the role, query or key."""
        return tokenize(self.texts.tokenizers[role], texts, self.texts.max_lengths[role],
                        append_eos=self.texts.appends_end)

    def pairs(self, queries, keys):
        """Return [(token ids, token types)] of the pairs of a query and a key text, for a ranker.
        """
        max_length = sum(self.texts.max_lengths.values())
        tokenizer = self.texts.tokenizers["query"]
        rows = tokenizer(queries, keys, truncation=True, max_length=max_length,
                         return_token_type_ids=True)
        return list(zip(rows["input_ids"], rows["token_type_ids"]))

    def key_text(self, key):
        """The text of a key: of a document of the corpus by its index, a text, or columns in the
        key template.

        Raises InputError for a key without a column of the template.
        """
        if isinstance(key, int):
            return self.corpus.text(key)
        return format_key(key, self.settings.key_template, "a training key")


def check_one_instruction(collator, tasks):
    """Raise InputError if the tasks have different instructions before the documents."""
    before_documents = {collator.instruction(task)[1] for task in tasks}
    if len(before_documents) > 1:
        raise InputError(f"questions of the tasks {', '.join(sorted(set(tasks)))} want other "
                         "instructions before the documents, which are encoded once: search task "
                         "by task, or leave instructions out with --add_instruction false")


def repeat_each(items, counts):
    """Return each item as often as its count: [a, b] by [2, 1] becomes [a, a, b]."""
    return [item for item, count in zip(items, counts) for _ in range(count)]


def identity(text):
    """Return a 64-bit number that equal documents share, made of their text.

    Ids are not used: many files number the passages of every question from 0.
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def tokenize(tokenizer, texts, max_length, append_eos=False):
    """Return lists of token ids with the special tokens that the tokenizer itself adds, truncated
    on the side that it truncates; append_eos ends each with the end-of-sequence token.
    """
    if not append_eos:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = tokenizer.sep_token_id
    rows = tokenizer(texts, truncation=True, max_length=max_length - 1)["input_ids"]
    return [row if row[-1:] == [eos] else row + [eos] for row in rows]
