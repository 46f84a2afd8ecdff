"""The fingerprint of an index: the content of the model's and the corpus's files, whatever their
folder.
"""
import json
import shutil

import pytest
import torch

from conftest import make_bert
from retrieval.corpus import Corpus
from retrieval.fingerprint import check_fingerprint, fingerprint
from retrieval_helpers import write_corpus
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


def test_the_tokenizer_is_part_of_the_fingerprint(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    copy = str(tmp_path / "bert")
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{text}")
    before = fingerprint(corpus, copy, {}, ALONE)
    assert before == fingerprint(corpus, bert, {}, ALONE)  # a copy elsewhere is the same
    vocabularies = [tmp_path / "bert" / name for name in ("vocab.txt", "tokenizer.json")]
    vocabulary = next(path for path in vocabularies if path.exists())
    vocabulary.write_text(vocabulary.read_text().replace("cradle", "carpet"))
    changed = fingerprint(corpus, copy, {}, ALONE)
    assert changed != before
    path = tmp_path / "bert" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # one bit of one weight
    path.write_bytes(content)
    assert fingerprint(corpus, copy, {}, ALONE) != changed


def test_a_hub_name_stands_for_itself(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{text}")
    description = fingerprint(corpus, "some/name", {"dtype": "float16"}, ALONE)
    assert description["model"] == "some/name" and description["dtype"] == "float16"
    assert len(description["files"]) == 1
    assert fingerprint(corpus, None, {"model": "bm25"}, ALONE)["model"] == "bm25"


def test_an_index_is_not_added_to(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl")
    before = fingerprint(Corpus(path, "{text}"), None, {}, ALONE)
    (tmp_path / "index.json").write_text(json.dumps(before))
    assert check_fingerprint(tmp_path, before)
    with open(path, "a") as file:
        file.write('{"_id": "more", "text": "more"}\n')
    now = fingerprint(Corpus(path, "{text}"), None, {}, ALONE)
    message = "holds an index of 8 documents, and the corpus has 9; .* delete the folder"
    with pytest.raises(InputError, match=message):
        check_fingerprint(tmp_path, now)
