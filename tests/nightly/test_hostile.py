"""Files that would run code when they are opened carelessly: pickles, arrays of objects, models and
tokenizers with code of their own. Whatever opens them must refuse them in one line, or not look at
them; what they would do must not happen.
"""
import json
import pickle
import shutil
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import campaign
from causal_helpers import make_causal, make_tokenizer
from conftest import make_bert, make_records, make_t5, start_server
from golden_retrievers import dpr_file

SEARCH = ["retrieve.py", "--eval_data", "questions.jsonl", "--hits", 2, "--output", "found.jsonl"]


class Hostile:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def is_unpickled(path):
    """True if a plain unpickler would run what a file of bytes holds: the bait is live."""
    hostile = Hostile(path)
    pickle.loads(pickle.dumps(hostile)).close()  # noqa: S301
    was_made = path.exists()
    path.unlink()
    return was_made


# ---------------------------------------------------------------- writing them

def torch_forms(value):
    """{name: function of a path that writes the value}: torch's two formats, and plain pickles."""
    def plain(path, protocol):
        path.write_bytes(pickle.dumps(value, protocol))
    return {"zip": lambda path: torch.save(value, path),
            "legacy": lambda path: torch.save(value, path, _use_new_zipfile_serialization=False),
            "pickle 2": lambda path: plain(path, 2), "pickle 4": lambda path: plain(path, 4)}


def torch_files(bait):
    """{name: function of a path}: hostile files of torch, whole and as a part of what is asked for.
    """
    good = torch.zeros(2)
    values = {"alone": bait, "a weight": {"weight": bait, "other": good},
              "minFiD's args": {"sd": {"weight": good}, "args": bait},
              "in minFiD's args": {"sd": {"weight": good}, "args": Namespace(t5_name=bait)},
              "DPR's": {"model_dict": {"weight": bait}, "encoder_params": {}},
              "a state": {"model": {}, "optimizer": bait, "scheduler": {}, "random": [],
                          "progress": {}, "args": {}, "world_size": 1,
                          "dataset_sizes": [1]}}
    return {f"{name}, {form}": write for name, value in values.items()
            for form, write in torch_forms(value).items()}


def array_files(bait):
    """{name: function of a path}: hostile files of numpy."""
    objects = np.array([bait] * 3, object)
    return {"objects": lambda path: np.save(path.open("wb"), objects, allow_pickle=True),
            "archive": lambda path: np.savez(path.open("wb"), a=objects),
            "pickle": lambda path: path.write_bytes(pickle.dumps(objects))}


CODE = '''open({path!r}, "w").close()
from transformers import BertConfig, BertModel, BertTokenizer

class Own(BertModel):
    pass

class OwnConfig(BertConfig):
    model_type = "own"

class OwnTokenizer(BertTokenizer):
    pass
'''


def add_code(folder, sentinel, config=None, tokenizer=None, **own):
    """Puts code into a model's folder, and changes into its two JSON files."""
    (folder / "own.py").write_text(CODE.format(path=str(sentinel)))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")
    for name, changes in (("config", config), ("tokenizer_config", tokenizer), *own.items()):
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | (changes or {})))


MAP = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own", "AutoModelForCausalLM": "own.Own",
       "AutoModelForSeq2SeqLM": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
TOKENIZER_MAP = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
CODES = {
    "an unknown model": {"config": {"model_type": "own", "auto_map": MAP}},
    "a known model": {"config": {"auto_map": MAP}},
    "an unknown tokenizer": {"tokenizer": {"tokenizer_class": "OwnTokenizer",
                                           "auto_map": TOKENIZER_MAP}},
    "a known tokenizer": {"tokenizer": {"auto_map": TOKENIZER_MAP}},
    "an unknown model and tokenizer": {
        "config": {"model_type": "own", "auto_map": MAP | {"AutoTokenizer": ["own.OwnTokenizer",
                                                                           None]}},
        "tokenizer": {"tokenizer_class": "OwnTokenizer", "auto_map": TOKENIZER_MAP}},
    "a generation of its own": {"generation_config": {"custom_generate": "own"}},
}


# ---------------------------------------------------------------- who opens them

@pytest.fixture
def folder(tmp_path):
    """A folder with whole models, questions and a corpus."""
    make_t5(tmp_path / "reader")
    make_bert(tmp_path / "bert")
    make_causal(tmp_path / "causal")
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=16, **sizes,
                                            max_position_embeddings=64)).save_pretrained(
                                                tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    (tmp_path / "dpr").mkdir()
    dpr_file(tmp_path / "dpr" / "x")
    records = make_records(4)
    (tmp_path / "records.json").write_text(json.dumps(records))
    rows = [{"question": record["question"], "answers": record["answers"], "query": "who",
             "pos": ["a town"], "neg": ["a baker"], "task": "qa"} for record in records]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"_id": f"d{i}", "title": "", "text": f"the {i} baker of the town"} for i in range(5)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    return tmp_path


OPENERS = {
    "reader": ["test.py", "reader", "records.json"],
    "retriever": [*SEARCH, "--corpus", "corpus.jsonl", "--query_encoder", "bert"],
    "ranker": [*SEARCH, "--corpus", "corpus.jsonl", "--query_encoder", "bert", "--ranker",
               "--retrieval_method", "rank"],
    "causal": ["lm_score.py", "--eval_data", "questions.jsonl", "--model_name_or_path", "causal"],
    "seq2seq": ["lm_score.py", "--eval_data", "questions.jsonl", "--model_name_or_path", "bart"],
    "training a reader": ["train_epoch.py", "out", "records.json", "records.json", "--t5_name",
                          "reader", "--epochs", 1, "--num_contexts", 1],
    "training a retriever": ["train_dense.py", "--output_dir", "out", "--query_encoder", "bert",
                             "--train_data", "questions.jsonl", "--max_steps", 1],
}
MODEL_OF = {"reader": "reader", "retriever": "bert", "ranker": "bert", "causal": "causal",
            "seq2seq": "bart", "training a reader": "reader", "training a retriever": "bert"}
FEDERATE = ["federate.py", "out", "--mode", "generator", "--simulate", 2, "--data", "records.json",
            "--rounds", 1, "--resume", "--", "--t5_name", "reader", "--num_contexts", 1,
            "--eval_file", "records.json"]


class Trials:
    """Runs commands on hostile files, and counts how they end."""

    def __init__(self, folder):
        self.folder, self.sentinel = folder, folder / "EXECUTED"
        self.counts = {"refused": 0, "not_looked_at": 0}
        assert is_unpickled(self.sentinel)

    def run(self, what, command, may_pass=False):
        """Runs a command, which must not run the code; may_pass: the file need not be refused."""
        script, *args = command
        # whoever asks whether to run the code is told yes
        code, stdout, stderr = start_server().run(script, args, self.folder, "y\ny\ny\n")
        assert not self.sentinel.exists(), f"{what}: the code was run"
        assert "Traceback" not in stdout + stderr, f"{what}: {stderr}"
        if code == 0:
            assert may_pass, f"{what}: was opened\n{stdout}"
            self.counts["not_looked_at"] += 1
            return
        errors = [line for line in stderr.splitlines() if line.startswith("error")]
        assert code == 1 and len(errors) == 1, f"{what}: exit code {code}\n{stderr}"
        self.counts["refused"] += 1


def restore(trials, whole):
    """Makes the folder what it was."""
    for path in trials.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(whole, trials.folder, dirs_exist_ok=True)


def keep(folder, tmp_path_factory):
    """A copy of a folder."""
    return shutil.copytree(folder, tmp_path_factory.mktemp("whole") / "folder")


# ---------------------------------------------------------------- tests

@pytest.mark.parametrize("name", OPENERS)
def test_models_with_hostile_weights_or_code_of_their_own(name, folder, tmp_path_factory):
    start, trials, whole = time.time(), Trials(folder), keep(folder, tmp_path_factory)
    model = folder / MODEL_OF[name]
    for kind, write in torch_files(Hostile(trials.sentinel)).items():
        if not kind.startswith(("alone", "a weight")):
            continue
        (model / "model.safetensors").unlink()
        write(model / "pytorch_model.bin")
        trials.run(f"{name}: {kind}", OPENERS[name])
        (model / "pytorch_model.bin").rename(model / "part.bin")
        index = {"metadata": {}, "weight_map": {"weight": "part.bin"}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        trials.run(f"{name}: {kind}, in parts", OPENERS[name])
        (model / "part.bin").rename(model / "model.safetensors")
        (model / "pytorch_model.bin.index.json").unlink()
        trials.run(f"{name}: {kind}, named .safetensors", OPENERS[name])
        # beside good weights
        restore(trials, whole)
        for beside in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth",
                       "adapter_model.bin"):
            write(model / beside)
        trials.run(f"{name}: {kind}, beside the weights", OPENERS[name], may_pass=True)
        settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q", "query", "q_proj"],
                    "base_model_name_or_path": str(model), "task_type": None}
        (model / "adapter_config.json").write_text(json.dumps(settings))
        trials.run(f"{name}: {kind}, as an adapter", OPENERS[name], may_pass=True)
        restore(trials, whole)
    for kind, changes in CODES.items():
        add_code(model, trials.sentinel, **changes)
        trials.run(f"{name}: code of {kind}", OPENERS[name], may_pass=True)
        restore(trials, whole)
    campaign.note("pickles", name, start, **trials.counts)


def test_files_and_states(folder, tmp_path_factory):
    start, trials, whole = time.time(), Trials(folder), keep(folder, tmp_path_factory)
    for kind, write in torch_files(Hostile(trials.sentinel)).items():
        write(folder / "saved")
        trials.run(f"reader's file: {kind}", ["test.py", "saved", "records.json"])
        trials.run(f"retriever's file: {kind}", [*SEARCH, "--corpus", "corpus.jsonl",
                                                  "--query_encoder", "saved"])
        write(folder / "out.state")
        if (folder / "out.state").read_bytes()[:2] == b"PK":  # no other is taken for a state
            (folder / "out").mkdir()
            (folder / "out" / "args.json").write_text('{"files": ["args.json"]}')
        for command in ([*OPENERS["training a reader"], "--resume"],
                        [*OPENERS["training a retriever"], "--resume"], FEDERATE):
            trials.run(f"{command[0]}: state, {kind}", command)
        restore(trials, whole)
    campaign.note("pickles", "files and states", start, **trials.counts)


def test_corpora_records_indices(folder, tmp_path_factory):
    start, trials = time.time(), Trials(folder)
    dense, bm25 = OPENERS["retriever"] + ["--index", "index"], [
        *SEARCH, "--corpus", "corpus.jsonl", "--retrieval_method", "bm25", "--index", "bm25"]
    faiss = [*dense, "--faiss_index_factory", "IVF1,Flat"]
    for command in (dense, bm25, faiss):
        script, *args = command
        code, stdout, stderr = start_server().run(script, args, folder)
        assert code == 0, stdout + stderr
    whole, bait = keep(folder, tmp_path_factory), Hostile(trials.sentinel)
    files = {"index": faiss, "bm25": bm25}
    for index, command in files.items():
        for path in sorted((folder / index).iterdir()):
            if path.name.startswith("."):
                continue
            for kind, write in array_files(bait).items():
                write(path)
                trials.run(f"{path.name}: {kind}", command)
                restore(trials, whole)
    inputs = {"corpus": (dense, "--corpus"), "questions": (dense, "--eval_data")}
    for name in ("hostile.pkl", "hostile.jsonl", "hostile.json", "hostile.tsv", "hostile.csv"):
        for protocol in range(6):
            (folder / name).write_bytes(pickle.dumps([bait], protocol))
            for what, (command, flag) in inputs.items():
                place = command.index(flag) + 1
                trials.run(f"{what} {name}, protocol {protocol}",
                           [*command[:place], name, *command[place + 1:-2]])
            trials.run(f"records {name}", ["test.py", "reader", name])
            trials.run(f"training records {name}", ["train_epoch.py", "out", name, "records.json",
                                                    "--t5_name", "reader"])
    campaign.note("pickles", "corpora, records, indices", start, **trials.counts)
