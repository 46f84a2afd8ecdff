"""BM25 in parts: results equal those of bm25s's one index; kills, damage, older indices."""
import json
import multiprocessing
import os
import random
import shutil
import threading
import time

import bm25s
import numpy as np
import pytest
import torch
from tqdm import tqdm

from conftest import WORDS
from records.corpus import Corpus
from retrieval import bm25, bm25_index
from retrieval.search import BM25Settings, SearchSettings
from retrieval_helpers import make_questions, write_rows
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch):
    """Save the time of thousands of small files; no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a corpus of 400 documents whose words differ in frequency.

    A sixth are copies, which have equal scores, and some have no words.
    """
    rng = random.Random(0)
    frequencies = [1 / rank for rank in range(1, len(WORDS) + 1)]
    texts = [" ".join(rng.choices(WORDS, frequencies, k=rng.randint(1, 30))) for _ in range(400)]
    for i in range(0, 400, 6):
        texts[i] = texts[i // 7]
    texts[50] = texts[51] = texts[399] = "the"
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return Corpus(write_rows(path, [{"text": text} for text in texts]), "{text}")


@pytest.fixture(scope="module")
def questions(corpus):
    """Return questions with repeated, unknown and no words."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(40)]
    return make_questions(*({"question": text} for text in [
        *texts, f"{texts[0]} {texts[0]}", "the", f"{texts[1]} unheard", corpus.text(0)]))


def divide_into(monkeypatch, documents):
    """Let a part have at most this many documents."""
    monkeypatch.setattr(bm25_index, "PART_DOCUMENTS", documents)


def make_settings(folder, hits=20, **changes):
    return SearchSettings("bm25", hits, index=str(folder), bm25=BM25Settings(k1=1.2, b=0.7),
                          **changes)


def read_files(folder):
    """Return {name: bytes} of an index's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_equal_bm25s(corpus, questions, tmp_path, monkeypatch):
    theirs = bm25s.BM25(k1=1.2, b=0.7)
    texts = [corpus.text(i) for i in range(len(corpus))]
    theirs.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25.open_words("en", None, "bm25s")
    expected = [theirs.get_scores(row) if row else np.zeros(len(corpus), np.float32)
                for row in bm25.tokenize_texts([question.text for question in questions], words)]
    num_rivals = []
    score_rivals = bm25.score_rivals
    monkeypatch.setattr(bm25, "score_rivals", lambda *args: (
        num_rivals.append(args) or score_rivals(*args)))
    for part_documents in (400, 90, 7):
        divide_into(monkeypatch, part_documents)
        settings = make_settings(tmp_path / str(part_documents))
        index = bm25.open_bm25(settings, corpus, ALONE)
        assert len(index.index.parts) == -(-400 // part_documents)
        for hits in (1, 5, 60, 500):
            settings = make_settings(tmp_path / str(part_documents), hits)
            results = bm25.search_words(settings, index, questions, ALONE)
            for i, all_scores in enumerate(expected):
                best = np.lexsort((np.arange(400), -all_scores))[:hits]
                best = best[all_scores[best] > 0]
                doc_indices, scores = results.row(i)
                assert doc_indices == best.tolist()
                assert scores == all_scores[best].tolist()  # to the last bit
    assert num_rivals


def test_parts_end_at_documents_and_bytes(corpus, monkeypatch):
    assert bm25_index.divide(corpus).tolist() == [0, 400]
    divide_into(monkeypatch, 150)
    assert bm25_index.divide(corpus).tolist() == [0, 150, 300, 400]
    monkeypatch.setattr(bm25_index, "PART_BYTES", 2000)
    bounds = bm25_index.divide(corpus)
    sizes = np.diff(corpus.parts[0].starts[bounds])
    assert sizes.max() <= 2000 and sizes[:-1].min() > 1500
    monkeypatch.setattr(bm25_index, "PART_BYTES", 1)
    assert bm25_index.divide(corpus).tolist() == list(range(401))


def stop_after(monkeypatch, count):
    """Let a build write `count` files; the next one raises KeyboardInterrupt."""
    save_array, saved = bm25_index.save_array, []

    def save(folder, name, values):
        if len(saved) == count:
            raise KeyboardInterrupt
        save_array(folder, name, values)
        saved.append(name)
    monkeypatch.setattr(bm25_index, "save_array", save)


def test_a_build_that_stops_after_any_file_continues(corpus, tmp_path, monkeypatch):
    """The files are those of a build that was not interrupted."""
    divide_into(monkeypatch, 150)
    bm25.open_bm25(make_settings(tmp_path / "whole"), corpus, ALONE)
    whole = read_files(tmp_path / "whole")
    # parts.npy; 5 files of each of 3 parts; starts of each; the vocabulary, idf; scores of each
    for count in range(1 + 3 * 5 + 3 + 4 + 1 + 3):
        folder = tmp_path / str(count)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, count)
            bm25.open_bm25(make_settings(folder), corpus, ALONE)
        assert not (folder / "index.json").exists()
        bm25.open_bm25(make_settings(folder), corpus, ALONE)
        assert read_files(folder) == whole


def build_in_child(folder, corpus):
    # processes share a lock of progress bars, and a killed child would keep it for ever
    tqdm.set_lock(threading.RLock())
    bm25.open_bm25(make_settings(folder), corpus, ALONE)


def test_a_killed_build_continues(corpus, tmp_path, monkeypatch):
    """The files are those of a build that was not interrupted."""
    divide_into(monkeypatch, 20)
    start = time.perf_counter()
    bm25.open_bm25(make_settings(tmp_path / "whole"), corpus, ALONE)
    seconds = time.perf_counter() - start
    context, rng, kills = multiprocessing.get_context("fork"), random.Random(), 0
    while not (tmp_path / "cut" / "index.json").exists():
        process = context.Process(target=build_in_child, args=(tmp_path / "cut", corpus))
        process.start()
        process.join(seconds * rng.random() / 2)
        kills += process.exitcode is None
        process.kill()
        process.join()
        seconds *= 1.05  # under load one step may take longer than half of the first build
    assert kills
    index = bm25.open_bm25(make_settings(tmp_path / "cut"), corpus, ALONE)
    assert len(index.index.parts) == 20
    assert read_files(tmp_path / "cut") == read_files(tmp_path / "whole")


def test_damaged_files_are_refused(corpus, questions, tmp_path, monkeypatch):
    divide_into(monkeypatch, 150)
    settings = make_settings(tmp_path / "index")
    bm25.open_bm25(settings, corpus, ALONE)
    whole = read_files(tmp_path / "index")
    for name in whole:
        if not name.endswith(".npy"):
            continue
        path = tmp_path / "index" / name
        for content in (None, b"", whole[name][:-1], whole[name] + b"0", whole[name][:100]):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(InputError, match=f"{name}: cannot be opened .* or delete"):
                bm25.open_bm25(settings, corpus, ALONE)
            path.write_bytes(whole[name])
    # a file of another part fits no other
    shutil.copy(tmp_path / "index" / "0.scores.npy", tmp_path / "index" / "2.scores.npy")
    with pytest.raises(InputError, match="its files do not belong together"):
        bm25.open_bm25(settings, corpus, ALONE)
    (tmp_path / "index" / "2.scores.npy").write_bytes(whole["2.scores.npy"])
    documents = np.load(tmp_path / "index" / "1.documents.npy")
    np.save(tmp_path / "index" / "1.documents.npy", documents + 1000)
    index = bm25.open_bm25(settings, corpus, ALONE)
    with pytest.raises(InputError, match="the index is broken .* delete the folder"):
        bm25.search_words(settings, index, questions, ALONE)


def test_an_interrupted_build_keeps_its_settings(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(bm25_index, "merge_words", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bm25.open_bm25(make_settings(folder), corpus, ALONE)
    assert (folder / "0.documents.npy").exists() and not (folder / "index.json").exists()
    other = SearchSettings("bm25", 5, index=str(folder))
    with pytest.raises(InputError, match="another k1, b .*now 0.9.* or delete this one"):
        bm25.open_bm25(other, corpus, ALONE)
    # a broken file between the passes
    (folder / "0.counts.npy").write_bytes(b"")
    with pytest.raises(InputError, match="0.counts.npy: cannot be opened .* or delete"):
        bm25.open_bm25(make_settings(folder), corpus, ALONE)
    other = SearchSettings("bm25", 5, index=str(folder), overwrite_index=True)
    bm25.open_bm25(other, corpus, ALONE)
    assert not [name for name in os.listdir(folder) if name.split(".")[1] in bm25_index.TEMPORARY]
    assert not (folder / "unfinished.json").exists()


def test_an_index_in_the_former_format_is_made_again(corpus, tmp_path, capsys):
    folder = tmp_path / "index"
    bm25.open_bm25(make_settings(folder), corpus, ALONE)
    whole = read_files(folder)
    fingerprint = json.loads(whole["index.json"])
    del fingerprint["format"]  # as earlier versions wrote it
    for name in whole:
        (folder / name).unlink()
    (folder / "index.json").write_text(json.dumps(fingerprint))
    (folder / "data.csc.index.npy").write_bytes(b"")
    (folder / ".lock").touch()
    with pytest.raises(InputError, match="holds an index of another k1, b"):  # or other settings
        bm25.open_bm25(SearchSettings("bm25", 5, index=str(folder)), corpus, ALONE)
    bm25.open_bm25(make_settings(folder), corpus, ALONE)
    note = "holds an index in an earlier version's format; it is made again"
    assert note in capsys.readouterr().out
    assert read_files(folder) == whole


def test_a_corpus_without_words_leaves_nothing(tmp_path):
    corpus = Corpus(write_rows(tmp_path / "c.jsonl", [{"text": "the"}, {"text": ""}]), "{text}")
    with pytest.raises(InputError, match="no document has a word except stop words"):
        bm25.open_bm25(make_settings(tmp_path / "index"), corpus, ALONE)
    assert os.listdir(tmp_path / "index") == [".lock"]
