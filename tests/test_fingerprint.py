"""The fingerprint of an index depends on the content of files, not on their folder."""
import json
import shutil

import pytest
import torch

from conftest import make_bert
from records.corpus import Corpus
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
    assert before == fingerprint(corpus, bert, {}, ALONE)  # a copy elsewhere is equal
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
    message = "holds an index of 8 documents, and the corpus has 9; .* delete this one"
    with pytest.raises(InputError, match=message):
        check_fingerprint(tmp_path, now)


def test_files_that_are_no_index_are_not_touched(tmp_path):
    expected = {"documents": 8}
    assert not check_fingerprint(tmp_path / "new", expected)
    assert not check_fingerprint(tmp_path, expected)
    (tmp_path / "vectors.npy").write_text("mine")
    with pytest.raises(InputError, match="to an index, such as vectors.npy, and is left as it is"):
        check_fingerprint(tmp_path, expected)
    (tmp_path / ".lock").write_text("")  # the folder of an index whose making was killed
    assert not check_fingerprint(tmp_path, expected)
    (tmp_path / "index.json").write_text('{"name": "of a web page"}')
    with pytest.raises(InputError, match="holds files that do not belong to an index"):
        check_fingerprint(tmp_path, expected)


def test_a_changed_corpus_is_told(tmp_path):
    (tmp_path / "index.json").write_text('{"documents": 8, "files": [["", 5, "ab"]]}')
    with pytest.raises(InputError, match="the corpus or the model has changed since"):
        check_fingerprint(tmp_path, {"documents": 8, "files": [["", 6, "cd"]]})
