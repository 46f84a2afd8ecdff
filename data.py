"""The reader's data: records to input texts and targets, batches of token ids, and who reads what
in an epoch.
"""
import random
from itertools import chain, islice

import torch

from records.fields import history_turns
from training.loop import make_loader
from utils import InputError, shorten

COUNTED = 1000  # passages whose lengths are counted when a run starts: a fraction of a second

# ---------------------------------------------------------------- texts

def format_passage(question, context):
    """The encoder's input for one passage (FiD section 3); a passage without a title gets no title
    part.
    """
    title = context.get("title")
    title_part = f"title: {title} " if title is not None else ""
    return f"question: {question} {title_part}context: {context['text']}"


def input_texts(record, num_contexts):
    """One text per context; the question alone where there is none (FiD, src/data.py)."""
    texts = [format_passage(record["question"], context)
             for context in record["ctxs"][:num_contexts]]
    return texts or [f"question: {record['question']}"]


def encode_inputs(tokenizer, records, num_contexts, max_length):
    """Return per record the token ids of each of its inputs, at most max_length: "question: ...
    title: ... context: ...", with "history: TURN TURN ..." before it where the record has a
    chat_history.

    What does not fit is cut: first the oldest turns, then the passage's end. There is no </s>.
    """
    histories = [history_turns(record) for record in records]
    texts = []
    for record, turns in zip(records, histories):
        blank = " " if turns else ""  # between history and question; most tokenizers add it anyway
        texts.append([blank + text for text in input_texts(record, num_contexts)])
    rows = tokenizer(list(chain.from_iterable(texts)), add_special_tokens=False,
                     verbose=False)["input_ids"]
    rows = (ids[:max_length] for ids in rows)  # whatever side the tokenizer would cut
    inputs = [list(islice(rows, len(record_texts))) for record_texts in texts]
    for index, turns in enumerate(histories):
        if turns:
            head, pieces = history_pieces(tokenizer, turns)
            inputs[index] = [keep_newest(head, pieces, max_length - len(ids)) + ids
                             for ids in inputs[index]]
    return inputs


def history_pieces(tokenizer, turns):
    """The token ids of "history:", and of the pieces that are dropped whole, the oldest first: the
    turns or, of a single one, its tokens.
    """
    head, *pieces = tokenizer(["history:", *(" " + turn for turn in turns)],
                              add_special_tokens=False, verbose=False)["input_ids"]
    if len(pieces) == 1:
        pieces = [[token] for token in pieces[0]]
    return head, pieces


def keep_newest(head, pieces, room):
    """The head and as many of the last pieces as fit into `room` tokens; nothing without a piece.
    """
    first, length = len(pieces), len(head)
    while first > 0 and length + len(pieces[first - 1]) <= room:
        first -= 1
        length += len(pieces[first])
    if first == len(pieces):
        return []
    return head + list(chain.from_iterable(pieces[first:]))


def choose_target(record, seed=None):
    """The training target: `target` if given, else an answer drawn by `seed`, or the first answer
    without a seed.
    """
    if record.get("target") is not None:
        return record["target"]
    if seed is None:
        return record["answers"][0]
    return random.Random(seed).choice(record["answers"])


def list_targets(record):
    """Return the texts that a record may be trained on: its `target`, else its answers."""
    return [record["target"]] if record.get("target") is not None else record["answers"]


def check_targets(records, tokenizer, max_length, path):
    """Raise InputError for a training record without an answer or, with max_length > 0, with a
    longer one in tokens.
    """
    for record in records:
        targets = list_targets(record)
        if not targets:
            raise InputError(f"{path}: record {shorten(record['id'])} has neither 'target' nor "
                             "'answers'; drop it from the training file")
        if max_length <= 0:
            continue
        for target, ids in zip(targets, tokenizer(targets)["input_ids"]):
            if len(ids) > max_length:
                raise InputError(f"{path}: record {shorten(record['id'])}: {shorten(target)} "
                                 f"takes {len(ids)} tokens, --answer_maxlength allows "
                                 f"{max_length}; raise it or shorten the answer")


def note_long_passages(records, collator, log):
    """Logs how many passages, of the first COUNTED, have more tokens than the reader reads."""
    max_length = collator.max_length
    texts = chain.from_iterable(collator.texts(record) for record in records)
    rows = collator.tokenizer(list(islice(texts, COUNTED)), add_special_tokens=False,
                              truncation=True, max_length=max_length + 1)["input_ids"]
    num_long = sum(len(ids) > max_length for ids in rows)
    if num_long:
        first = "the first " if len(rows) == COUNTED else ""
        log(f"note: {num_long} of {first}{len(rows)} passages exceed {max_length} tokens, question "
            "and title included; their ends are not read (--max_length; scripts/make_corpus.py "
            "cuts documents into passages)")


# ---------------------------------------------------------------- batches

class Collator:
    """Turns (index, record, target) samples into a batch of tensors.

    Inputs are cut at `max_length` tokens, see encode_inputs; they carry no </s>, as in FiD (under
    transformers 3.0.2) and minFiD, and are padded to the longest of the batch only. Targets carry
    exactly one </s>. Returns {indices, inputs, labels (B, T) with -100 as padding, or None}; the
    inputs, which the reader takes by their names, are input_ids (B, N, L) and attention_mask (B, N,
    L) bool.
    """

    def __init__(self, tokenizer, num_contexts, max_length):
        self.tokenizer, self.num_contexts, self.max_length = tokenizer, num_contexts, max_length
        if tokenizer.pad_token_id is None:
            raise InputError("the tokenizer has no padding token; use the tokenizer of a T5 model")

    def __call__(self, samples):
        records = [record for _, record, _ in samples]
        questions = encode_inputs(self.tokenizer, records, self.num_contexts, self.max_length)
        input_ids, attention_mask = pad_passages(questions, self.tokenizer.pad_token_id)
        return {"indices": [index for index, _, _ in samples],
                "inputs": {"input_ids": input_ids, "attention_mask": attention_mask},
                "labels": self.labels([target for _, _, target in samples])}

    def texts(self, record):
        """The texts that are read of a record."""
        return input_texts(record, self.num_contexts)

    def labels(self, targets):
        """(B, T) ids ending in </s>, -100 after it; a target of None is all -100 (no loss); None if
        all of them are.
        """
        return pad_labels(targets, self.target_ids)

    def target_ids(self, target):
        """The target's token ids with exactly one </s>, at the end."""
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer(target, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token != eos] + [eos]


def pad_passages(questions, pad_token, side="right"):
    """(ids, mask), both (B, N, L), of lists of the token ids of each question's passages; the
    padding lies on that side of them.
    """
    B, N = len(questions), max(len(passages) for passages in questions)
    L = max(1, max(len(ids) for passages in questions for ids in passages))
    input_ids = torch.full((B, N, L), pad_token)
    attention_mask = torch.zeros((B, N, L), dtype=torch.bool)
    for b, passages in enumerate(questions):
        for n, ids in enumerate(passages):
            place = slice(len(ids)) if side == "right" else slice(L - len(ids), L)
            input_ids[b, n, place] = torch.tensor(ids, dtype=torch.long)
            attention_mask[b, n, place] = True
    return input_ids, attention_mask


def pad_labels(targets, target_ids):
    """(B, T) of the targets' ids, see Collator.labels."""
    if all(target is None for target in targets):
        return None
    rows = [[-100] if target is None else target_ids(target) for target in targets]
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


class TrainSet(torch.utils.data.Dataset):
    """Records with their targets; an answer is drawn anew each epoch, the same one for any number
    of processes.
    """

    def __init__(self, records, seed, shuffle, path=""):
        self.records, self.seed, self.shuffle, self.epoch = records, seed, shuffle, 0
        self.path = path

    def name_examples(self, indices):
        """Return the records' ids and file, for an error message."""
        ids = [shorten(self.records[index]["id"]) for index in indices]
        return f"records {', '.join(ids)} of {self.path}"

    def __getitem__(self, entry):
        """(index, record, target) of an entry of plan_epoch; an entry that is not real has no
        target.
        """
        index, is_real = entry
        record = self.records[index]
        if not is_real:
            return index, record, None
        seed = f"{self.seed}/{self.epoch}/{index}" if self.shuffle else None
        return index, record, choose_target(record, seed)


def plan_epoch(num_records, epoch, seed, shuffle, batch_size, accumulation, rank=0, world_size=1):
    """This process's part of an epoch: [update][micro-batch][(index, is_real)].

    All processes shuffle alike; an update takes batch_size * accumulation * world_size records in
    that order, the last one of an epoch what remains. A process left without a record there joins
    with one that is not real, so that the gradient exchange has all processes.
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
    """Batches of consecutive records, strided over the processes: each record once, in the same
    batch for any number of them.
    """
    samples = [(index, record, None) for index, record in enumerate(records)]
    batches = [range(first, min(first + batch_size, len(records)))
               for first in range(0, len(records), batch_size)]
    return make_loader(samples, batches[rank::world_size], collator, num_workers)
