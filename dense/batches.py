"""From examples to batches: the plan of an epoch over processes and datasets, the group of keys of
each planned example, and token ids.
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
from training.token_ids import encode_texts
from utils import InputError

LENGTH_SAMPLE = 1000  # keys that note_long_keys tokenises, in a fraction of a second

# ---------------------------------------------------------------- plan

def plan_batches(sizes, epoch, seed, shuffle, batch_size, accumulation, same_dataset=None, rank=0,
                 world_size=1):
    """Return this process's part of an epoch, [update][micro-batch][(example index, is_real)].

    The processes' micro-batches form one batch of batch_size * world_size examples; each process
    takes every world_size-th example. The batches do not depend on the number of processes. The
    last batch may be smaller. If it has no example left for a process, that process gets a dummy
    entry (is_real=False).

    sizes         examples per dataset; example indices count through all datasets
    same_dataset  None: mix the datasets. epoch: take each batch from one dataset, each example
                  once. random: draw each batch's dataset in proportion to its size, then its
                  examples without replacement
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
    """Draw an epoch's batches, each from a dataset drawn in proportion to its size."""
    sizes = np.array([len(dataset) for dataset in datasets])
    count = math.ceil(sizes.sum() / size)
    drawn = rng.choice(len(datasets), count, p=sizes / sizes.sum())
    return [rng.permutation(datasets[index])[:size] for index in drawn]


def cut_batches(datasets, size, shuffle, rng):
    """Cut one dataset after another into batches, each example once."""
    batches = []
    for dataset in datasets:
        order = rng.permutation(dataset) if shuffle else dataset
        batches += [order[first:first + size] for first in range(0, len(order), size)]
    return batches


# ---------------------------------------------------------------- visits

class Visit(NamedTuple):
    """Hold an example and the group of keys that an epoch chooses for it."""
    index: int
    is_real: bool           # False: a dummy entry, because DDP's all-reduce needs every process
    example: Example
    keys: list
    teacher_scores: list    # one per key, or None


class GroupSet(torch.utils.data.Dataset):
    """Turn entries of the plan into Visits. Each epoch draws new groups, which do not depend on the
    number of processes.
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
        """Return the Visit of an entry of the plan, (index, is_real)."""
        index, is_real = planned
        example = self.examples[index]
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
        keys, teacher_scores = choose_group(example, self.group_rules[index], rng)
        return Visit(index, is_real, example, keys, teacher_scores)


# ---------------------------------------------------------------- collator

class GroupCollator:
    """Turn B visits, each with a group of keys, into a batch of B queries and K keys:

    indices     examples' indices (B)
    is_real     False for a dummy batch
    task        the first example's; its settings hold for the batch
    queries     arrays of token ids of B queries
    keys        arrays of token ids of K keys, group after group
    pairs       K pairs (token ids, types) for a ranker, instead of queries and keys
    sizes       groups' sizes (B) int64, with sum K: G, or 1 for an example without negatives
    teacher     scores (B, G), where G is the largest size; nan for examples without scores and
                after the keys of a smaller group
    identities  (K) int64, equal for equal documents
    positives   the identities of each query's positives (B lists), with --mask_duplicates
    """

    def __init__(self, texts, corpus=None, mask_duplicates=False):
        """Set up a collator for these Texts (dense/texts.py); corpus: for keys that are indices."""
        self.texts = texts
        self.settings = texts.settings
        self.corpus = corpus
        self.mask_duplicates = mask_duplicates
        self.num_long_pairs = 0  # pairs made so far that fill the tokens allowed

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
        """Return the identities of a visit's positive and of its example's other positives."""
        return [identity(self.key_text(key)) for key in (visit.keys[0], *visit.example.pos)]

    def instruction(self, task):
        """Return (the text before queries, the text before keys) of a task."""
        return self.texts.instruction(task)

    def queries(self, texts, tasks, instructions=None):
        """Return token ids of queries in the query template, after an instruction.

        instructions: the records' own; None stands for the task's instruction.
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
        self.num_long_pairs += sum(len(ids) >= max_length for ids in rows["input_ids"])
        return list(zip(rows["input_ids"], rows["token_type_ids"]))

    def key_text(self, key):
        """Return the text of a key: a corpus index, a text, or columns for the key template.

        Raises InputError for a key that lacks a column of the template.
        """
        if isinstance(key, int):
            return self.corpus.text(key)
        return format_key(key, self.settings.key_template, "a training key")


def note_long_keys(examples, collator, log):
    """Log how many of the first LENGTH_SAMPLE training keys fill the tokens allowed.

    The count includes keys of exactly that length.
    """
    is_ranker, num_keys, num_long = collator.settings.ranker, 0, 0
    max_lengths = collator.texts.max_lengths
    limit = sum(max_lengths.values()) if is_ranker else max_lengths["key"]
    for example in examples:
        keys = [*example.pos, *example.neg][:LENGTH_SAMPLE - num_keys]
        texts = [collator.key_text(key) for key in keys]
        if not texts:
            continue
        if is_ranker:
            rows = [ids for ids, _ in collator.pairs([example.query] * len(texts), texts)]
        else:
            rows = collator.keys(texts, [example.task] * len(texts))
        num_keys += len(rows)
        num_long += sum(len(ids) >= limit for ids in rows)
        if num_keys == LENGTH_SAMPLE:
            break
    if num_long:
        what = "pairs of a query and a key" if is_ranker else "keys"
        first = "the first " if num_keys == LENGTH_SAMPLE else ""
        log(f"note: {num_long} of {first}{num_keys} {what} have {limit} tokens or more; only the "
            f"first {limit} are read (--key_max_length; scripts/make_corpus.py cuts documents into "
            "passages)")


def check_one_instruction(collator, tasks):
    """Raise InputError if the tasks have different instructions for the documents."""
    before_documents = {collator.instruction(task)[1] for task in tasks}
    if len(before_documents) > 1:
        raise InputError(f"the tasks {', '.join(sorted(set(tasks)))} have different instructions "
                         "for the documents, which are encoded once; search task by task, or leave "
                         "instructions out with --add_instruction false")


def repeat_each(items, counts):
    """Return each item as often as its count: [a, b] by [2, 1] becomes [a, a, b]."""
    return [item for item, count in zip(items, counts) for _ in range(count)]


def identity(text):
    """Return a 64-bit hash of a document's text, with white space normalised.

    Ids would not do, because many files number the passages of every question from 0.
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def tokenize(tokenizer, texts, max_length, append_eos=False):
    """Return an array of token ids for each text, truncated on the tokenizer's side, with its
    special tokens. The main process reads and packs arrays faster than lists.

    append_eos: end each array with the end-of-sequence token if the tokenizer does not.
    """
    if not append_eos:
        return make_arrays(encode_texts(tokenizer, texts, max_length))
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = tokenizer.sep_token_id
    rows = encode_texts(tokenizer, texts, max_length - 1)
    return make_arrays([row if row[-1:] == [eos] else row + [eos] for row in rows])


def make_arrays(rows):
    """Return lists of token ids as arrays."""
    return [np.array(row, dtype=np.int32) for row in rows]
