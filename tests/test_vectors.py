"""Encoding a corpus: the note on documents that are longer than the model reads."""
import torch

from records.corpus import Corpus
from retrieval import vectors
from retrieval.vectors import encode_corpus
from retrieval_helpers import write_rows
from utils import World

ALONE = World(0, 0, 1, torch.device("cpu"))


class LengthEncoder:
    """Encode a text as the vector of its length."""

    def eval(self):
        return self

    def encode(self, token_ids, role):
        return torch.tensor([[len(ids)] for ids in token_ids], dtype=torch.float32)


def test_documents_that_are_cut_off_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vectors, "DONE_BLOCK", 2)
    rows = [{"text": "word " * length} for length in (3, 9, 5, 4, 7)]
    corpus = Corpus(write_rows(tmp_path / "corpus.jsonl", rows), "{text}")

    def tokenize(texts):
        return [text.split()[:5] for text in texts]

    def encode():
        found = encode_corpus(LengthEncoder(), corpus, tokenize, 5, tmp_path / "index", "float32",
                              ALONE, {"documents": 5})
        return found[:, 0].tolist(), capsys.readouterr().out
    lengths, said = encode()
    assert lengths == [3, 5, 5, 4, 5]
    assert said.startswith("note: 3 of 5 documents have 5 tokens or more; ")
    assert encode() == (lengths, "")  # nothing was encoded now
