"""The reader's data: input texts and targets of records, batches of token ids, and the plan of an
epoch (which process reads which records).
"""
import random
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch

from layers.packing import PackedTexts, pack_texts
from records.fields import history_turns
from records.reader_records import read_facts
from training.loop import make_loader
from training.token_ids import encode_texts
from utils import InputError, shorten

LENGTH_SAMPLE = 1000  # passages that note_long_passages tokenises, in a fraction of a second

# ---------------------------------------------------------------- texts

def input_texts(record, num_contexts):
    """Return the encoder's input text for each context (FiD section 3), or the question alone if
    there is no context (FiD, src/data.py).
    """
    question = f"question: {record['question']}"
    texts = []
    for context in record["ctxs"][:num_contexts]:
        title = "" if context.get("title") is None else f"title: {context['title']} "
        texts.append(f"{question} {title}context: {context['text']}")
    return texts or [question]


def encode_inputs(tokenizer, records, num_contexts, max_length):
    """Return the token ids of each record's input texts, [record][text][token], without </s>.

    A record's chat_history comes first, as "history: TURN TURN ...". A text has at most max_length
    tokens: the oldest turns are dropped first, then the end of the passage is truncated.
    """
    histories = [history_turns(record) if record.get("chat_history") else []
                 for record in records]
    texts = []
    for record, turns in zip(records, histories):
        blank = " " if turns else ""  # between history and question; most tokenizers add it anyway
        texts.append([blank + text for text in input_texts(record, num_contexts)])
    rows = encode_texts(tokenizer, list(chain.from_iterable(texts)), add_special_tokens=False)
    rows = (ids[:max_length] for ids in rows)  # the tokenizer may truncate on the left
    inputs = [list(islice(rows, len(record_texts))) for record_texts in texts]
    for index, turns in enumerate(histories):
        if turns:
            head, pieces = encode_history(tokenizer, turns)
            inputs[index] = [keep_newest(head, pieces, max_length - len(ids)) + ids
                             for ids in inputs[index]]
    return inputs


def encode_history(tokenizer, turns):
    """Return (ids of "history:", [ids of each piece, oldest first]). Pieces are dropped whole. Each
    turn is a piece or, if there is only one turn, each of its tokens.
    """
    head, *pieces = encode_texts(tokenizer, ["history:", *(" " + turn for turn in turns)],
                                 add_special_tokens=False)
    if len(pieces) == 1:
        pieces = [[token] for token in pieces[0]]
    return head, pieces


def keep_newest(head, pieces, room):
    """Return the head with as many of the last pieces as fit into `room` tokens, or [] if no piece
    fits.
    """
    first, length = len(pieces), len(head)
    while first > 0 and length + len(pieces[first - 1]) <= room:
        first -= 1
        length += len(pieces[first])
    if first == len(pieces):
        return []
    return head + list(chain.from_iterable(pieces[first:]))


def list_targets(record):
    """Return the texts that a record, or the facts about it, name as targets: its `target`, else
    its answers.
    """
    return [record["target"]] if record.get("target") is not None else record["answers"]


def check_targets(records, tokenizer, max_length, path):
    """Raise InputError for a training record without a target, or with a target of more than
    max_length tokens (0: no limit).
    """
    for facts in read_facts(records):
        targets = list_targets(facts)
        if not targets:
            raise InputError(f"{path}: record {shorten(facts['id'])} has neither 'target' nor "
                             "'answers'; drop it from the training file")
        if max_length <= 0:
            continue
        for target, ids in zip(targets, tokenizer(targets)["input_ids"]):
            if len(ids) > max_length:
                raise InputError(f"{path}: record {shorten(facts['id'])}: {shorten(target)} "
                                 f"takes {len(ids)} tokens, --answer_maxlength allows "
                                 f"{max_length}; raise it or shorten the answer")


def note_long_passages(records, collator, log):
    """Log how many of the first LENGTH_SAMPLE passages have more than max_length tokens."""
    max_length = collator.max_length
    texts = chain.from_iterable(collator.texts(record) for record in records)
    rows = collator.tokenizer(list(islice(texts, LENGTH_SAMPLE)), add_special_tokens=False,
                              truncation=True, max_length=max_length + 1)["input_ids"]
    num_long = sum(len(ids) > max_length for ids in rows)
    if num_long:
        first = "the first " if len(rows) == LENGTH_SAMPLE else ""
        log(f"note: {num_long} of {first}{len(rows)} passages exceed {max_length} tokens, question "
            "and title included; their ends are not read (--max_length; scripts/make_corpus.py "
            "cuts documents into passages)")


# ---------------------------------------------------------------- batches

class Collator:
    """Turn (index, record, target) samples into a batch of tensors.

    Inputs have at most `max_length` tokens (see encode_inputs) and no </s>, as in FiD (under
    transformers 3.0.2) and minFiD. Targets end with exactly one </s>. A batch is {indices, inputs,
    labels (B, T), or None without targets}, where inputs is {passages: PackedPassages}, packed for
    this type of device.
    """

    def __init__(self, tokenizer, num_contexts, max_length, device_type="cpu"):
        self.tokenizer, self.num_contexts, self.max_length = tokenizer, num_contexts, max_length
        self.device_type = device_type
        if tokenizer.pad_token_id is None:
            raise InputError("the tokenizer has no padding token; use the tokenizer of a T5 model")

    def __call__(self, samples):
        records = [record for _, record, _ in samples]
        questions = encode_inputs(self.tokenizer, records, self.num_contexts, self.max_length)
        passages = pack_passages(questions, self.tokenizer.pad_token_id, self.device_type)
        return {"indices": [index for index, _, _ in samples], "inputs": {"passages": passages},
                "labels": pad_labels([target for _, _, target in samples], self.target_ids)}

    def texts(self, record):
        """Return a record's input texts."""
        return input_texts(record, self.num_contexts)

    def target_ids(self, target):
        """Return the target's token ids, with exactly one </s> at the end."""
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer(target, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token != eos] + [eos]


class PackedPassages(NamedTuple):
    """Hold the passages of B questions, N each, as rows of one matrix.

    M is the largest number of tokens that any question has in all its passages.
    """
    texts: PackedTexts         # the passages
    counts: torch.Tensor       # (B, N) number of tokens of each passage
    memory_rows: torch.Tensor  # (B, M) row of each token, in passage order; S at padding
    passages: torch.Tensor     # (B, M) index of each token's passage
    positions: torch.Tensor    # (B, M) position of each token in its passage
    longest: int               # tokens of the longest passage


def pack_passages(questions, padding_id, device_type="cpu"):
    """Return PackedPassages, on the CPU, of [question][passage][token] ids, with the ALIGN of the
    device that they are for.

    Two questions, whose passages have [3, 1] and [2, 0] tokens (B = 2, N = 2, M = 4), with ALIGN 2:

        passages          packed, longest passage first    memory_rows
        a1 a2 a3 | b1     a1 a2 a3 --  c1 c2  b1 --        0 1 2 6     of a1 a2 a3 b1
        c1 c2    |         0  1  2  3   4  5   6  7        4 5 8 8        c1 c2 -- --
    """
    B, N = len(questions), max(len(passages) for passages in questions)
    texts = []
    for passages in questions:
        texts += passages + [[]] * (N - len(passages))
    packed = pack_texts(texts, padding_id, device_type)
    counts = packed.lengths.view(B, N)

    # the tokens in reading order: passage by passage, question by question
    lengths, totals = packed.lengths.numpy(), counts.sum(1).numpy()                 # (B * N), (B)
    text = np.repeat(np.arange(B * N), lengths)
    question = text // N
    position, column = count_up(lengths), count_up(totals)
    M = max(1, int(totals.max()))
    rows = np.full((B, M), len(packed.ids))
    passage_indices, positions = np.zeros((2, B, M), dtype=np.int64)
    rows[question, column] = packed.starts.numpy()[text] + position
    passage_indices[question, column] = text % N
    positions[question, column] = position
    rows, passage_indices, positions = map(torch.from_numpy, (rows, passage_indices, positions))
    return PackedPassages(packed, counts, rows, passage_indices, positions, int(counts.max()))


def count_up(lengths):
    """Return 0 .. length - 1 for each of the lengths, one after another."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)


def pack_padded(input_ids, attention_mask, device_type="cpu"):
    """Return PackedPassages of padded passages (B, N, L), as FiD's code has them.

    Raise ValueError if a passage does not have its real tokens first.
    """
    mask = attention_mask.bool()
    if not (mask[..., 1:] <= mask[..., :-1]).all():
        raise ValueError("attention_mask must have each passage's real tokens first and its "
                         "padding after them")
    questions = [[ids[real].tolist() for ids, real in zip(*question)]
                 for question in zip(input_ids, mask)]
    return pack_passages(questions, 0, device_type)._replace(longest=mask.shape[2])


def pad_labels(targets, target_ids):
    """Return labels (B, T), the ids target_ids(target) padded with -100, or None if all targets are
    None. A single target of None becomes a row of -100, which adds no loss.
    """
    if all(target is None for target in targets):
        return None
    rows = [[-100] if target is None else target_ids(target) for target in targets]
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


class TrainSet(torch.utils.data.Dataset):
    """Return records with their targets.

    Each epoch draws one of a record's answers, the same one for any number of processes.
    """

    def __init__(self, records, seed, shuffle, path=""):
        self.records, self.seed, self.shuffle, self.epoch = records, seed, shuffle, 0
        self.path = path

    def name_examples(self, indices):
        """Return the records' ids and file, for an error message."""
        ids = [shorten(self.records[index]["id"]) for index in indices]
        return f"records {', '.join(ids)} of {self.path}"

    def __getitem__(self, entry):
        """Return (index, record, target) of an entry (index, is_real) of plan_epoch; the target of
        a dummy entry is None.
        """
        index, is_real = entry
        record = self.records[index]
        if not is_real:
            return index, record, None
        targets = list_targets(record)
        if not self.shuffle:
            return index, record, targets[0]
        return index, record, random.Random(f"{self.seed}/{self.epoch}/{index}").choice(targets)


class EvalSet(torch.utils.data.Dataset):
    """Return records without targets."""

    def __init__(self, records):
        self.records = records

    def __getitem__(self, index):
        """Return (index, record, None)."""
        return index, self.records[index], None


def plan_epoch(num_records, epoch, seed, shuffle, batch_size, accumulation, rank=0, world_size=1):
    """Return this process's part of an epoch: [update][micro-batch][(index, is_real)].

    All processes shuffle with the same seed. An update takes the next batch_size * accumulation *
    world_size records; the last update of an epoch takes the rest. If a process has no record in
    it, the process gets one dummy entry (is_real=False), because DDP's all-reduce needs every
    process.
    """
    order = torch.arange(num_records)
    if shuffle:
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(num_records, generator=generator)
    updates = []
    for update_indices in order.split(batch_size * accumulation * world_size):
        entries = [(index, True) for index in update_indices[rank::world_size].tolist()]
        entries = entries or [(update_indices[0].item(), False)]
        updates.append([entries[i:i + batch_size] for i in range(0, len(entries), batch_size)])
    return updates


def eval_loader(records, batch_size, collator, num_workers, rank=0, world_size=1):
    """Return a loader of batches of consecutive records, strided over the processes. Each record
    is read once, in the same batch for any number of processes.
    """
    batches = [range(first, min(first + batch_size, len(records)))
               for first in range(0, len(records), batch_size)]
    return make_loader(EvalSet(records), batches[rank::world_size], collator, num_workers)
