"""Exact search: any number of ties, any size of blocks and slices, merging of parts."""
import numpy as np
import pytest
import torch

from retrieval import exact_search
from retrieval.exact_search import merge, part_range, search_blocks, search_vectors, top_k


def test_top_k_breaks_ties_by_column():
    values, columns = top_k(torch.tensor([[1.0, 3, 2, 3, 2, 2]]), 3)
    assert columns.tolist() == [[1, 3, 2]] and values.tolist() == [[3, 3, 2]]
    many = np.random.default_rng(0).integers(0, 50, (4, 1003)).astype(np.float32)
    many[1] = 7                      # all equal
    many[2, ::3] = np.inf
    many[3, ::2] = -np.inf
    for k in (1, 7, 31, 500, 1002, 1003, 2000):
        values, columns = top_k(torch.from_numpy(many), k)
        expected = np.stack([np.lexsort((np.arange(1003), -row))[:k] for row in many])
        assert columns.tolist() == expected.tolist()
        assert values.tolist() == np.take_along_axis(many, expected, 1).tolist()
    values, columns = top_k(torch.zeros(2, 0), 5)
    assert values.shape == columns.shape == (2, 0)


def test_merge_breaks_ties_by_index():
    one = np.array([[7, 2]]), np.array([[5.0, 1.0]])
    two = np.array([[1, -1]]), np.array([[5.0, 9.0]])
    doc_indices, scores = merge([one, two], 3)
    assert doc_indices.tolist() == [[1, 7, 2]] and scores.tolist() == [[5, 5, 1]]


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_exact_search_equals_faiss(metric, monkeypatch):
    """Any size of blocks and query slices gives faiss's documents; ties are ordered by index."""
    import faiss
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1000, 16), np.float32)
    queries = rng.standard_normal((37, 16), np.float32)
    vectors[500:520] = vectors[3]
    queries[5] = vectors[3]
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(16)
    index.add(vectors)
    faiss_scores, faiss_indices = index.search(queries, 25)
    for block, slice_size in ((2048, 1024), (64, 10), (10, 37), (333, 5)):
        monkeypatch.setattr(exact_search, "BLOCK", block)
        monkeypatch.setattr(exact_search, "QUERIES", slice_size)
        doc_indices, scores = search_vectors(vectors, torch.from_numpy(queries), 0, 1000, 25,
                                             metric, is_main=False)
        np.testing.assert_allclose(scores, -faiss_scores if metric == "l2" else faiss_scores,
                                   atol=1e-4)
        rest = [i for i in range(37) if i != 5]
        np.testing.assert_array_equal(doc_indices[rest], faiss_indices[rest])
        copies = doc_indices[5][np.isin(doc_indices[5], [3, *range(500, 520)])]
        assert len(copies) == 21 and (np.diff(copies) > 0).all()
        part, _ = search_vectors(vectors, torch.from_numpy(queries), 640, 655, 25, metric,
                                 is_main=False)
        assert part.shape == (37, 15) and (np.sort(part, 1) == np.arange(640, 655)).all()


def search_both(vectors, queries, k, metric, monkeypatch):
    """Return the results of BestOnCPU, after checking that BestOnGPU's are the same."""
    found = search_vectors(vectors, queries, 0, len(vectors), k, metric, is_main=False)
    with monkeypatch.context() as patch:
        patch.setattr(exact_search, "BestOnCPU", exact_search.BestOnGPU)
        plain = search_vectors(vectors, queries, 0, len(vectors), k, metric, is_main=False)
    for array, expected in zip(found, plain):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    return found


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_candidates_give_the_documents_of_the_plain_search(metric, dtype, monkeypatch):
    """Scores of small integers tie at every rank, also at the k-th, within blocks and across."""
    monkeypatch.setattr(exact_search, "BLOCK", 16)
    monkeypatch.setattr(exact_search, "QUERIES", 10)
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (333, 4)).astype(dtype)
    queries = rng.integers(-2, 3, (23, 4)).astype(np.float32)
    if metric == "cos":
        vectors /= np.maximum(1, np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
        metric = "ip"
    scores = queries @ vectors.astype(np.float32).T
    if metric == "l2":
        scores = -np.square(queries[:, None] - vectors.astype(np.float32)).sum(2)
    for k in (1, 7, 16, 40, 333, 500):
        doc_indices, found = search_both(vectors, torch.from_numpy(queries), k, metric, monkeypatch)
        np.testing.assert_allclose(found, -np.sort(-scores)[:, :k], atol=1e-5)
        for row, values in zip(doc_indices, found):
            assert len(set(row)) == len(row) == min(k, 333)
            assert (np.diff(row)[np.diff(values) == 0] > 0).all()


def test_candidates_of_any_number_per_block(monkeypatch):
    """Blocks that are better than all before, or never, or only for one query."""
    monkeypatch.setattr(exact_search, "BLOCK", 32)
    rising = np.arange(300, dtype=np.float32)[:, None] * np.array([1, -1, 0], np.float32)
    queries = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    doc_indices, _ = search_both(rising, queries, 6, "ip", monkeypatch)
    assert doc_indices[:, :3].tolist() == [[299, 298, 297], [0, 1, 2], [0, 1, 2]]
    assert doc_indices[2].tolist() == list(range(6))  # all scores are equal
    monkeypatch.setattr(exact_search, "MANY", 0.1)
    doc_indices, _ = search_both(rising, queries[:1], 6, "ip", monkeypatch)
    assert doc_indices.tolist() == [[299, 298, 297, 296, 295, 294]]
    assert search_both(rising, queries[:0], 6, "ip", monkeypatch)[0].shape == (0, 6)


def test_blocks_are_searched_in_float32_and_none_gives_nothing():
    rng = torch.Generator().manual_seed(0)
    queries, vectors = torch.randn(3, 8, generator=rng), torch.randn(20, 8, generator=rng).half()
    expected = (queries @ vectors.float().T).sort(dim=1, descending=True)
    with torch.autocast("cpu", torch.bfloat16):
        doc_indices, scores = search_blocks(queries, [(0, vectors[:12]), (12, vectors[12:])], 4)
    assert torch.equal(doc_indices, expected.indices[:, :4])
    torch.testing.assert_close(scores, expected.values[:, :4])
    doc_indices, scores = search_blocks(queries, [], 4)
    assert doc_indices.shape == scores.shape == (3, 0) and doc_indices.dtype == torch.int64


def test_parts_cover_all_and_are_whole_blocks(monkeypatch):
    monkeypatch.setattr(exact_search, "PART_UNIT", 16)
    for count in (1, 16, 60, 1000):
        for size in (1, 2, 3, 7):
            ranges = [part_range(count, rank, size) for rank in range(size)]
            assert ranges[0][0] == 0 and ranges[-1][1] == count
            assert all(last == first for (_, last), (first, _) in zip(ranges, ranges[1:]))
            assert all(first % 16 == 0 or first == count for first, _ in ranges)


def test_a_part_is_whole_blocks():
    assert exact_search.PART_UNIT % exact_search.BLOCK == 0
