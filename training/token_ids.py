"""Token ids of many texts, straight from the Rust library behind a tokenizer.

tokenizer(texts) also makes attention masks and the texts' offsets, which nobody here reads. And the
library remembers the ids of only the first 10,000 words that a T5 tokenizer meets. Both together
make a T5 tokenizer take 1.5 times as long (`python bench/full_size.py --loader`).
"""
from transformers import PreTrainedTokenizerFast

CACHED_WORDS = 100_000  # words of which a tokenizer keeps the ids, 20 MB in each process


def encode_texts(tokenizer, texts, max_length=None, add_special_tokens=True):
    """Return a list of token ids for each text: tokenizer(texts)["input_ids"].

    max_length: most tokens of a text, special tokens included; None: no limit. Texts are truncated
    on the tokenizer's side.
    """
    if not uses_rust_alone(tokenizer):
        rows = tokenizer(texts, add_special_tokens=add_special_tokens, max_length=max_length,
                         truncation=max_length is not None, verbose=False)
        return rows["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # tokenizer.json may set padding and a length
    if max_length is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    if hasattr(backend.model, "_resize_cache"):  # WordPiece has no cache
        backend.model._resize_cache(CACHED_WORDS)
    encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def uses_rust_alone(tokenizer):
    """Return False for a tokenizer written in Python, or one that adds steps in Python (LUKE)."""
    return all(getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name)
               for name in ("__call__", "_encode_plus"))
