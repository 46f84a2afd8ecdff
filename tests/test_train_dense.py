"""train_dense.py as a user runs it: every task's records, qrels, several processes, GradCache,
resuming, bad input.
"""
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from conftest import WORDS, make_bert, run, run_and_kill

BASE = ["--lr", "1e-3", "--warmup_ratio", "0", "--logging_steps", "1", "--query_max_length", "16",
        "--key_max_length", "24"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0,
                     attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with LLM-Embedder records of several tasks, DPR records, and a corpus with
    queries and qrels. A key repeats its query's words.
    """
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))
    documents = [text(rng.randint(5, 15)) for _ in range(40)]
    queries = [" ".join(rng.sample(documents[i].split(), 4)) for i in range(11)]
    rows = {"qa": [], "chat": [], "tool": [], "dpr": []}
    for i, query in enumerate(queries):
        neg = rng.sample(documents[11:], 5)
        rows["qa"].append({"query": query, "query_id": i, "pos": [documents[i]], "neg": neg,
                           "pos_index": [i], "answers": ["baker"], "teacher_scores": [2.0]
                           + [rng.random() for _ in neg], "task": "qa"})
        rows["chat"].append({"query": query, "history": [documents[i]] + neg[:3],
                             "teacher_scores": [0.5, 0.1, 0.2, -0.3], "task": "chat"})
        rows["tool"].append({"query": query, "pos": [documents[i]], "neg": neg, "task": "tool"})
        rows["dpr"].append({"question": query, "answers": ["x"],
                            "positive_ctxs": [{"title": "it", "text": documents[i]}] if i else [],
                            "hard_negative_ctxs": [{"title": "a", "text": key} for key in neg],
                            "negative_ctxs": []})
    rows["corpus"] = [{"_id": f"d{i}", "title": "", "text": key} for i, key in enumerate(documents)]
    rows["queries"] = [{"_id": f"q{i}", "text": query} for i, query in enumerate(queries)]
    for name, own in rows.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in own))
    qrels = [f"q{i}\td{d}\t{score}" for i in range(11) for d,
             score in [(i, 3), *((d, d % 2) for d in rng.sample(range(11, 40), 4))]]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore"] + qrels) + "\n")
    return folder


def train(out, bert, *flags, **more):
    stdout, stderr = run("train_dense.py", "--output_dir", out, "--query_encoder", bert, *BASE,
                         *flags, **more)
    rows = [json.loads(line) for line in open(f"{out}.jsonl")] if more.get("code", 0) == 0 else []
    return [value for row in rows for value in row["loss_curve"]], rows, stdout, stderr


def qrels_flags(files, *more):
    return ["--corpus", files / "corpus.json", "--queries", files / "queries.json", *more]


@pytest.mark.parametrize("task,flags", [("qa",
                                         ["--stable_distill", "--eval_data", "qa.json", "--corpus",
                                          "corpus.json", "--metrics", "nq", "recall", "--cutoffs",
                                          "1", "5"]),
                                        ("qa", ["--add_instruction", "false", "--select_positive",
                                                "random", "--contrastive_weight", "0",
                                                "--stable_distill"]),
                                        ("chat", ["--select_positive", "teacher",
                                                  "--contrastive_weight", "0",
                                                  "--teacher_temperature", "0.1", "--version",
                                                  "llm-embedder", "--query_max_length", "64",
                                                  "--key_max_length", "64"]),
                                        ("tool", ["--key_template", "{text}", "--tie_encoders",
                                                  "false", "--dense_metric", "ip",
                                                  "--mask_duplicates"])])
def test_tasks_learn_what_they_are_shown(task, flags, bert, files, tmp_path):
    flags = [files / flag if flag.endswith(".json") else flag for flag in flags]
    curve, rows, stdout, _ = train(tmp_path / "out", bert, "--train_data", files / f"{task}.json",
                                   "--max_steps", 12, "--train_group_size", 4, *flags)
    assert len(curve) == 12 and sum(curve[-3:]) < sum(curve[:3])
    version = "llm-embedder" if "llm-embedder" in flags else "bge"
    is_told = f"{version}'s instructions are put before the texts of {task}" in stdout
    assert is_told == ("--add_instruction" not in flags)
    if "--eval_data" in flags:
        # above chance
        assert {"nq@1", "recall@5"} <= rows[-1].keys() and rows[-1]["recall@5"] > 5 / 40


def test_all_tasks_at_once_in_two_processes(bert, files, tmp_path):
    paths = [files / f"{task}.json" for task in ("qa", "chat", "tool", "tool")]
    _, rows, stdout, _ = train(tmp_path / "out", bert, "--train_data", *paths,
                               "--inbatch_same_dataset", "epoch", "--use_train_config",
                               "--gradient_checkpointing", "--per_device_train_batch_size", 3,
                               "--deepspeed", "x.json", "--max_steps", 9, "--early_exit_steps", 7,
                               processes=2)
    assert "44 training examples of 4 dataset(s)" in stdout and rows[-1]["update"] == 7


def test_processes_and_gradcache_give_the_plain_batch(bert, files, tmp_path):
    """Compare 11 queries in batches of 6 on 1 process and of 3 on 2 processes, with and without
    GradCache. The last batch has 5 queries, unequal on 2 processes.
    """
    common = ["--train_data", files / "qa.json", "--epochs", 2, "--train_group_size", 3]
    plain, *others = [train(tmp_path / name, bert, *common, "--batch_size", size, *more,
                            processes=processes)[0] for name, size, processes,
                      more in (("a", 6, 1, []), ("b", 3, 2, []), ("c", 6, 1, ["--chunk_size", 4]),
                               ("d", 3, 2, ["--chunk_size", 4]))]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "abcd"]
    for curve, own in zip(others, weights[1:]):
        assert curve == pytest.approx(plain, abs=2e-4) and len(curve) == 4
        # its gradient is a rounding error, which Adam magnifies
        for key in (key for key in weights[0] if not key.endswith("key.bias")):
            value = weights[0][key]
            torch.testing.assert_close(own[key], value, atol=2e-4, rtol=1e-3)


def test_qrels_with_measures_best_checkpoint_and_two_processes(bert, files, tmp_path):
    flags = qrels_flags(files, "--positives", f"qrels={files}/qrels.tsv,min_score=2", "--negatives",
                        f"qrels={files}/qrels.tsv,max_score=2", "--group_size", 4, "--eval_qrels",
                        f"qrels={files}/qrels.tsv", "--eval_steps", 2, "--max_steps", 6,
                        "--cutoffs", 1, 10)
    values = []
    for processes in (1, 2):
        _, rows, stdout, _ = train(tmp_path / f"out{processes}", bert, *flags, "--batch_size",
                                   4 // processes, processes=processes)
        values.append([row["ndcg@10"] for row in rows if "ndcg@10" in row])
        assert len(values[-1]) == 3 and "best mrr@10" in stdout
    assert values[0] == pytest.approx(values[1], abs=0.02)
    _, rows, _, _ = train(tmp_path / "full", bert, *flags, "--eval_method", "retrieval",
                          "--best_metric", "recall@10")
    assert 0 <= rows[-1]["recall@1"] <= rows[-1]["recall@10"] <= 1


def test_graded_labels_and_in_batch_only(bert, files, tmp_path):
    curve, _, _, _ = train(tmp_path / "graded", bert,
                           *qrels_flags(files, "--graded", f"qrels={files}/qrels.tsv",
                                        "--group_size", 5), "--max_steps", 10, "--dense_metric",
                           "ip", "--loss", "kl")
    assert sum(curve[-3:]) < sum(curve[:3])
    _, _, stdout, _ = train(tmp_path / "in-batch", bert,
                            *qrels_flags(files, "--positives",
                                         f"qrels={files}/qrels.tsv,min_score=2"), "--max_steps", 2)
    assert "groups of 1" in stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_dpr_records_by_average_rank(processes, bert, files, tmp_path):
    _, rows, stdout, _ = train(tmp_path / "out", bert, "--train_data", files / "dpr.json",
                               "--eval_data", files / "dpr.json", "--max_steps", 12, "--group_size",
                               2, "--eval_steps", 1, "--key_template", "{title} [SEP] {text}",
                               "--pair_types", "--dense_metric", "ip", "--tie_encoders", "false",
                               processes=processes)
    ranks = [row["rank"] for row in rows if "rank" in row]
    assert "1 records dropped: no positive" in stdout and "best rank" in stdout
    assert ranks[-1] < ranks[0]
    assert (tmp_path / "out" / "key" / "modules.json").exists()


@pytest.mark.parametrize("flags", [["--ranker", "--dropout", "0.1"],
                                   ["--lora", "4", "--pooling_method", "mean"],
                                   ["--bf16", "--num_workers", "1"]])
def test_rankers_adapters_and_bf16(flags, bert, files, tmp_path):
    if "--ranker" in flags:
        flags = flags + qrels_flags(files, "--eval_qrels", f"qrels={files}/qrels.tsv")
    curve, _, _, _ = train(tmp_path / "out", bert, "--train_data", files / "qa.json",
                              "--max_steps", 20, "--train_group_size", 3, "--chunk_size", 5, *flags)
    assert sum(curve[-4:]) < sum(curve[:4])
    again = train(tmp_path / "again", tmp_path / "out", "--train_data", files / "qa.json",
                  "--max_steps", 1, "--train_group_size", 3, *flags)[0]
    assert again[0] < curve[0]


def test_a_folder_holds_the_last_run_only(bert, files, tmp_path):
    for tied, there in (("false", {"query", "key"}),
                        ("true", {"modules.json", "model.safetensors"}),
                        ("false", {"query", "key"})):
        train(tmp_path / "out", bert, "--train_data", files / "tool.json", "--max_steps", 1,
              "--tie_encoders", tied, "--train_group_size", 2, "--overwrite")
        found = {"query", "key", "modules.json",
                 "model.safetensors"} & {path.name for path in (tmp_path / "out").iterdir()}
        assert found == there


def test_resume_after_kill_gives_the_same_weights(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert = make_bert(tmp_path / "dropout", hidden_dropout_prob=0.1,
                     attention_probs_dropout_prob=0.1)
    data = tmp_path / "qa.json"
    data.write_text((files / "qa.json").read_text())
    flags = ["--query_encoder", bert, *BASE, "--train_data", data, "--max_steps", 60,
             "--save_steps", 5, "--batch_size", 3]
    run("train_dense.py", "--output_dir", tmp_path / "whole", *flags)
    run_and_kill("train_dense.py", "--output_dir", tmp_path / "cut", *flags, at=100)
    stdout, _ = run("train_dense.py", "--output_dir", tmp_path / "cut", *flags, "--resume")
    assert "resuming after" in stdout and "resuming after 60" not in stdout
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    curves = [[v for line in open(tmp_path / f"{name}.jsonl")
               for v in json.loads(line)["loss_curve"]] for name in ("whole", "cut")]
    assert curves[0] == curves[1] and len(curves[0]) == 60
    _, stderr = run("train_dense.py", "--output_dir", tmp_path / "cut", *flags, "--resume",
                    "--seed", 7, code=1)
    assert "--seed 42 (now 7)" in stderr
    data.write_text(data.read_text() + "\n")  # A32
    _, stderr = run("train_dense.py", "--output_dir", tmp_path / "cut", *flags, "--resume", code=1)
    assert "cut.state is from a run in which " in stderr
    assert "qa.json' had another content" in stderr


@pytest.mark.parametrize("flags,message", [(["--train_data", "absent.json"],
                                            "absent.json: no such file"),
                                           (["--train_data", "qa.json", "--metrics", "f1"],
                                            "got f1"),
                                           (["--train_data", "tool.json", "--contrastive_weight",
                                             "0"], "only InfoNCE can be trained"),
                                           (["--train_data", "tool.json", "--select_positive",
                                             "teacher", "--teacher_scores_min", "0",
                                             "--max_sample_num", "0"], "no example is left"),
                                           (["--train_data", "qa.json", "--eval_data", "chat.json"],
                                            "needs --corpus"),
                                           (["--train_data", "qa.json", "--lr", "1e30",
                                             "--max_steps", "9"], "is not finite in update"),
                                           (["--positives", "qrels=qrels.tsv"],
                                            "qrels need --corpus and --queries"),
                                           (["--train_data", "qa.json", "--eval_data", "dpr.json",
                                             "--best_metric", "mrr@10"],
                                            "--best_metric mrr@10 is not measured"),
                                           (["--train_data", "qa.json", "--ranker",
                                             "--mask_duplicates"], "which a ranker does"),
                                           (["--train_data", "qa.json", "--stable_distill",
                                             "--student_temperature", "0.1"],
                                            "--stable_distill does not use --student_temp"),
                                           ([], "nothing to train on")])
def test_bad_input_is_one_line(flags, message, bert, files, tmp_path):
    flags = [f"{files}/{flag}" if flag.endswith(".json") else flag for flag in flags]
    _, _, _, stderr = train(tmp_path / "out", bert, *flags, code=1)
    assert message in stderr and "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1
