"""Tiny causal language models with a byte-level tokenizer of their own."""
from argparse import Namespace

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from conftest import make_records

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
# Llama with an output layer of its own, Qwen2 with one that is the embedding's, as GPT-2
CONFIGS = {
    "gpt2": lambda **changes: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                         **changes),
    "llama": lambda **changes: LlamaConfig(**SIZES | {"attention_dropout": 0.1} | changes),
    "qwen2": lambda **changes: Qwen2Config(**SIZES | {"tie_word_embeddings": True} | changes)}


def make_tokenizer(**special):
    """Return a byte-level BPE tokenizer trained on records; <s> and <pad> exist only if `special`
    has them.
    """
    texts = []
    for record in make_records(30):
        texts += [record["question"], *record["answers"], *(c["text"] for c in record["ctxs"])]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "<end>", "<pad>"],
                            show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer,
                                   **{"eos_token": "<end>"} | special)


def make_causal(folder, family="llama", tokenizer=None, **changes):
    """Write a tokenizer and a model with random weights, large enough that texts differ. Return the
    folder. The vocabulary leaves room for ids that some families' tokenizer classes add.
    """
    tokenizer = tokenizer or make_tokenizer()
    settings = {"vocab_size": len(tokenizer) + 8, "eos_token_id": tokenizer.eos_token_id,
                "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family](**settings | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def script_logits(reader, make_rows):
    """Make each forward pass of padded prompts return the logits make_rows(ids) (K, 1, V)."""
    reader.why_padded = "a script"
    reader.run = lambda ids, *args, **options: Namespace(logits=make_rows(ids),
                                                         past_key_values=None)
