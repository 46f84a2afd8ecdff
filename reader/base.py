"""The interface of a reader, which FiDT5 (model.py) and CausalReader (reader/causal.py) provide."""
from abc import ABC, abstractmethod

from torch import nn

from utils import InputError


class Reader(nn.Module, ABC):
    """Define what the scripts call on a reader, in this order.

    from_pretrained opens a checkpoint. check_tokenizer fits reader and tokenizer to each other.
    set_lengths and check_records refuse, before any computation, what the model cannot read.
    make_collator returns the collator of its batches: {"indices", "inputs", "labels"}, where
    "inputs" holds the tensors that forward and generate take by name. forward trains, generate
    answers, save_pretrained writes a folder in transformers' format. `config` is transformers'
    configuration.
    """

    # ---------------------------------------------------------------- what a reader must do

    @abstractmethod
    def check_tokenizer(self, tokenizer):
        """Adopt the tokenizer's special tokens. Raise InputError for a tokenizer that does not
        fit the model.
        """

    @property
    @abstractmethod
    def end_tokens(self):
        """Return the ids that end an answer."""

    @abstractmethod
    def set_lengths(self, max_length, answer_maxlength):
        """Set the largest number of tokens of an input and of an answer. Raise InputError if the
        model cannot read that many.
        """

    @abstractmethod
    def make_collator(self, tokenizer, num_contexts, max_length):
        """Return the collator that turns (index, record, target) samples into a batch."""

    @abstractmethod
    def set_checkpoint(self, use_checkpoint):
        """Turn activation checkpointing on or off."""

    @abstractmethod
    def forward(self, *, labels, reduction="mean", **inputs):
        """Return (loss, logits) of labels (B, T), where -100 is padding; the loss is the mean over
        the labels or, with reduction "sum", their sum.
        """

    @abstractmethod
    def generate(self, *, max_length, num_beams=1, return_scores=False, n_best=None, **inputs):
        """Return the ids (B, <= max_length) of the answers.

        With `return_scores` also return the scores (B, N) of the passages. With `n_best` the ids
        are (B, n_best, T), and their log probabilities (B, n_best) are returned last.
        """

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path_or_name, dropout=None, **options):
        """Return the reader of a folder or hub name; `dropout` replaces the model's rates."""

    @abstractmethod
    def save_pretrained(self, folder):
        """Write the model as a folder that transformers opens."""

    # ---------------------------------------------------------------- what a reader may change

    def check_records(self, records, num_contexts, path, trains=False):
        """Raise InputError for a record of the file `path` that the reader cannot read; by default
        every record is accepted.
        """

    def count_answer_tokens(self, max_length):
        """Return the most tokens that generate(max_length=...) can give an answer."""
        return max_length

    def forget_generation(self):
        """Drop the settings of generation_config.json and return them as {name: value}; by default
        return {}.
        """
        return {}

    def add_adapters(self, lora, device, bf16=False, base=None):
        """Add adapters as LoraSettings describe them. Raise InputError by default."""
        raise InputError("--lora is for causal language models: the layers of a T5 reader "
                         "(layers/t5.py) run without the modules that peft replaces; leave it out")

    def describe(self):
        """Return the entries that the reader adds to args.json."""
        return {}
