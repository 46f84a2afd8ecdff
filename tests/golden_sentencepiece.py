"""Writes tests/golden/spiece.*.model, small sentencepiece models, and spiece.json, the ids that
sentencepiece itself gives some texts.

    pip install sentencepiece==0.2.1
    python tests/golden_sentencepiece.py

sentencepiece is needed here alone: training/t5_folder.py reads its files without it.
"""
import json
import os
import tempfile

import sentencepiece

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
TEXTS = [
    "The harbour office opens at seven.",
    "  two  blanks and  more ",
    "üñknown letters, ﬁ and Ａ",
    "你好 world {x}",
    "",
    "Bob 's boat .",
]
T5_ORDER = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
MODELS = {
    "t5": T5_ORDER,
    "own": {"pad_id": 3},  # sentencepiece's order: <unk> 0, <s> 1, </s> 2
    "bytes": T5_ORDER | {"byte_fallback": True, "vocab_size": 400},
    "mt5": T5_ORDER | {"user_defined_symbols": [f"▁<extra_id_{i}>" for i in range(3, -1, -1)]},
}


def main():
    pages = ("README.md", "docs/formats.md", "docs/reader.md")
    root = os.path.dirname(os.path.dirname(GOLDEN))
    expected = {"texts": TEXTS}
    with tempfile.TemporaryDirectory() as folder:
        rules = os.path.join(folder, "rules.tsv")  # a few normalisations keep the files small
        with open(rules, "w") as file:
            file.write("FB01\t66 69\nFF21\t41\n")
        for name, settings in MODELS.items():
            settings = {"vocab_size": 120} | settings
            prefix = os.path.join(GOLDEN, f"spiece.{name}")
            sentencepiece.SentencePieceTrainer.train(
                input=[os.path.join(root, page) for page in pages], model_prefix=prefix,
                normalization_rule_tsv=rules, hard_vocab_limit=False, minloglevel=2, **settings)
            os.remove(f"{prefix}.vocab")
            model = sentencepiece.SentencePieceProcessor(f"{prefix}.model")
            ids = [model.encode(text) for text in TEXTS]
            expected[name] = {"size": len(model), "eos": model.eos_id(), "pad": model.pad_id(),
                              "unk": model.unk_id(), "ids": ids,
                              "decoded": [model.decode([i for i in row if i != model.unk_id()])
                                          for row in ids]}
    with open(os.path.join(GOLDEN, "spiece.json"), "w") as file:
        json.dump(expected, file, ensure_ascii=False)


if __name__ == "__main__":
    main()
