"""faiss's indices: built, opened again, compared with exact search; bad settings are refused."""
import numpy as np
import pytest
import torch

from retrieval import faiss_index
from retrieval.exact_search import search_vectors
from retrieval.faiss_index import describe_search, open_indices, search_indices
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("factory,settings", [
    ("IVF2,Flat", {"nprobe": 2}), ("HNSW8", {"efSearch": 300}), ("OPQ4,IVF2,PQ4x4", {"nprobe": 2})])
def test_faiss_indices(factory, settings, metric, tmp_path):
    """An index is built, opened again, and equals exact search if nothing is compressed."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 8), np.float32).astype(np.float16)
    query_vectors = torch.from_numpy(rng.standard_normal((20, 8), np.float32))

    def open_again(factory=factory, train_sample=None):
        return open_indices(tmp_path, vectors, factory, metric, train_sample, 0, ALONE)
    exact_indices, exact_scores = search_vectors(vectors, query_vectors, 0, 300, 5, metric)
    doc_indices, scores = search_indices(open_again(), query_vectors, 5, metric, settings)
    second_indices, _ = search_indices(open_again(), query_vectors, 5, metric, settings)
    assert (doc_indices == second_indices).all() and len(list(tmp_path.glob("*.faiss"))) == 1
    if "PQ" in factory:
        recalls = [len(set(exact) & set(given)) / 5 for exact,
                   given in zip(exact_indices, doc_indices)]
        assert np.mean(recalls) > 0.3
    else:
        assert (doc_indices == exact_indices).all()
        np.testing.assert_allclose(scores, exact_scores, atol=1e-3)
    other = {"efSearch": 10} if "IVF" in factory else {"nprobe": 2}
    with pytest.raises(InputError, match="is not a setting of this index"):
        search_indices(open_again(), query_vectors, 5, metric, other)
    with pytest.raises(InputError, match="300 vectors are too few to train it"):
        open_again("IVF301,Flat")
    with pytest.raises(InputError, match="7 vectors are too few to train a rotation of 8"):
        open_again("OPQ4,PQ4x4", train_sample=7)


@pytest.mark.parametrize("factory", ["IVF4,PQ2x4", "SQ8"])
def test_a_killed_build_goes_on(factory, tmp_path, monkeypatch):
    """The blocks of the last copy are not added again, and the index is the same."""
    monkeypatch.setattr(faiss_index, "ADDED", 100)
    monkeypatch.setattr(faiss_index, "SAVED_EVERY", -1)
    vectors = np.random.default_rng(0).standard_normal((500, 8), np.float32)
    query_vectors = torch.from_numpy(vectors[:20])

    def search(folder):
        parts = open_indices(folder, vectors, factory, "l2", None, 0, ALONE)
        return search_indices(parts, query_vectors, 10, "l2", {})
    (tmp_path / "whole").mkdir()
    expected = search(tmp_path / "whole")

    (tmp_path / "killed").mkdir()
    saved = []
    write_index = faiss_index.write_index

    def write_and_die(index, path):
        write_index(index, path)
        saved.append(index.ntotal)
        if len(saved) == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(faiss_index, "write_index", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed")
    stem = factory.replace(",", "_") + ".200000.0"
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [
        f"{stem}.0-of-1.unfinished.faiss"]
    (tmp_path / "killed" / f"{stem}.1-of-3.unfinished.faiss").touch()  # left by other processes
    found = search(tmp_path / "killed")
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert saved == [0, 100, 200, 300, 300, 400, 500]
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [f"{stem}.0-of-1.faiss"]


def test_a_process_without_a_part_has_no_documents():
    doc_indices, _ = search_indices([], torch.zeros(3, 8), 5, "ip", {})
    assert (doc_indices == -1).all() and len(doc_indices) == 3


def test_an_index_without_settings_is_searched_widely_enough(tmp_path):
    """faiss's default of one list would miss most documents, and find fewer than k."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((40, 16), np.float32)
    vectors = centres[rng.integers(40, size=4000)] + 0.5 * rng.standard_normal((4000, 16))
    vectors = vectors.astype(np.float16)
    query_vectors = torch.from_numpy(vectors[:50].astype(np.float32))
    exact_indices, _ = search_vectors(vectors, query_vectors, 0, 4000, 10, "ip")
    none = {"nprobe": None, "efSearch": None}
    for factory, said in (("IVF64,Flat", "16 of 64 lists are searched per query (--nprobe)"),
                          ("RR16,IVF64,Flat", "16 of 64 lists are searched per query (--nprobe)"),
                          ("HNSW16", "a search has a breadth of 64 (--efSearch)"), ("SQ8", "")):
        parts = open_indices(tmp_path, vectors, factory, "ip", None, 0, ALONE)
        doc_indices, _ = search_indices(parts, query_vectors, 10, "ip", none)
        recalls = [len(set(exact) & set(given)) / 10
                   for exact, given in zip(exact_indices, doc_indices)]
        assert np.mean(recalls) > 0.9, factory
        assert describe_search(parts[0][1], 10, none) == said
    parts = open_indices(tmp_path, vectors, "IVF64,Flat", "ip", None, 0, ALONE)
    assert describe_search(parts[0][1], 10, {"nprobe": 3}).startswith("3 of 64 lists")
    doc_indices, _ = search_indices(parts, query_vectors, 1500, "ip", none)
    assert (doc_indices >= 0).all()  # enough lists are searched to hold k documents
    doc_indices, _ = search_indices(parts, query_vectors, 1500, "ip", {"nprobe": 1})
    assert (doc_indices < 0).any()
