"""What people reported of other repositories, tried here: the right value of each; the names in the
docstrings are those of the repositories and the numbers of their issues.
"""
import json

import pytest

import train_dense
from conftest import make_bert
from dense.flags import parse_args as parse_dense
from utils import InputError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(out, bert, *flags):
    """Return the loss of every update of a training without dropout."""
    args = parse_dense("", ["--output_dir", str(out), "--query_encoder", bert, "--dropout", "0",
                            "--version", "none", "--lr", "1e-3", "--warmup_ratio", "0",
                            "--query_max_length", "16", "--key_max_length", "16", "--no_shuffle",
                            "--save_steps", "9", *map(str, flags)])
    train_dense.main(args)
    rows = [json.loads(line) for line in open(f"{out}.jsonl")]
    return [loss for row in rows for loss in row["loss_curve"]]


def test_a_smaller_last_micro_batch_counts_by_its_queries(bert, tmp_path):
    """keras 20241, transformers PR 35207: 4 + 1 queries are an update's mean over 5."""
    rows = [{"query": f"who wrote {letter}", "pos": [f"town {letter}"], "neg": ["animal baker"],
             "teacher_scores": [index - 2.0, 1.0]} for index, letter in enumerate("abcde")]
    path = write_lines(tmp_path / "train.jsonl", rows)
    losses = []
    for name, *flags in (("one", 5, 1), ("two", 4, 2), ("three", 2, 3)):
        batch, accumulation = flags
        losses.append(train(tmp_path / name, bert, "--train_data", path, "--loss", "kl",
                            "--group_size", 2, "--max_steps", 2, "--batch_size", batch,
                            "--grad_accumulation", accumulation))
    # the second loss is that of the weights which the first update has left
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_dev_questions_of_several_tasks_are_refused(bert, tmp_path):
    """retrieve.py refuses them, too: the documents would get the first task's instruction."""
    dev = write_lines(tmp_path / "dev.jsonl", [
        {"query": "who", "task": task, "pos_index": [0]} for task in ("qa", "tool")])
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"title": "", "text": "baker"}])
    data = write_lines(tmp_path / "train.jsonl", [{"query": "a", "pos": ["b"], "neg": ["c"]}])
    with pytest.raises(InputError, match="tasks qa, tool want other instructions before the doc"):
        train(tmp_path / "out", bert, "--train_data", data, "--eval_data", dev, "--corpus", corpus,
              "--metrics", "mrr", "--version", "llm-embedder", "--max_steps", 1)
