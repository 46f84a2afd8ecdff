"""Hash files, so that indices, resume states and journals notice a change."""
import hashlib
import os

WINDOW = 65536        # bytes
CORPUS_WINDOWS = 256  # windows to hash in a corpus file, which may have many gigabytes
WEIGHT_ENDINGS = (".safetensors", ".bin", "config.json", "modules.json",
                  "config_sentence_transformers.json")
TOKENIZER_BEGINNINGS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens",
                        "added_tokens")


def model_files(model):
    """Return the sorted paths of a model's weights, configurations and tokenizer files.

    `model` is a file or a folder; a hub name gives [].
    """
    if os.path.isfile(model):
        return [model]
    paths = []
    for folder, _, names in sorted(os.walk(model)):
        for name in sorted(names):
            if name.endswith(WEIGHT_ENDINGS) or name.startswith(TOKENIZER_BEGINNINGS):
                paths.append(os.path.join(folder, name))
    return paths


def hash_file(path):
    """Return a hash of a whole file."""
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def hash_windows(path, count):
    """Return a hash of `count` evenly spaced windows of a file, the first and the last included."""
    digest = hashlib.blake2b(digest_size=12)
    last_start = max(0, os.path.getsize(path) - WINDOW)
    with open(path, "rb") as file:
        for i in range(count):
            file.seek(last_start * i // (count - 1))
            digest.update(file.read(WINDOW))
    return digest.hexdigest()
