"""FiD-KD and LSR: what teaches the retriever arrives there, and their recipes on small files."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from conftest import ROOT, make_bert, make_records, make_t5, run, stages_run
from data import pack_padded
from model import FiDT5
from test_loop_recipes import small_world  # noqa: F401

# ---------------------------------------------------------------- the teacher's scores

def test_attention_scores_are_the_logs_of_the_shares_of_the_passages(tmp_path):
    make_t5(tmp_path / "t5", dropout_rate=0.0)
    reader = FiDT5.from_pretrained(tmp_path / "t5").eval()
    lengths = [[5, 9, 7], [8, 0, 3]]
    ids, mask = torch.zeros(2, 3, 9, dtype=torch.long), torch.zeros(2, 3, 9, dtype=torch.bool)
    torch.manual_seed(0)
    for b in range(2):
        for n, length in enumerate(lengths[b]):
            ids[b, n, :length] = torch.randint(3, 500, (length,))
            mask[b, n, :length] = True
    _, scores = reader.generate(pack_padded(ids, mask), 3, return_scores="attention")

    # the padded T5's attention probabilities
    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", attn_implementation="eager")
    t5.eval()
    flat_ids, flat_mask = ids.view(6, 9), mask.view(6, 9).long()  # (B, N, L) -> (B * N, L)
    with torch.no_grad():
        states = t5.encoder(flat_ids, attention_mask=flat_mask).last_hidden_state.view(2, 27, -1)
        output = t5(encoder_outputs=(states.nan_to_num(),), attention_mask=mask.view(2, 27).long(),
                    decoder_input_ids=torch.zeros(2, 1, dtype=torch.long), output_attentions=True)
    shares = torch.stack(output.cross_attentions).mean((0, 2, 3)).view(2, 3, 9).sum(-1)
    assert torch.allclose(scores.exp()[mask.any(-1)], shares[mask.any(-1)], atol=1e-5)
    assert scores[1, 1] == float("-inf")
    assert torch.allclose(scores.exp().sum(1), torch.ones(2), atol=1e-5)
    _, logits = reader.generate(pack_padded(ids, mask), 3, return_scores=True)
    assert not torch.allclose(logits[0], scores[0])


@pytest.mark.parametrize("loss", ["kl", "fid-kd"])
def test_queries_and_keys_both_learn_from_a_likelihood(tmp_path, loss):
    """FedRAG's collator detaches the retriever's scores, so that its LSR learns nothing."""
    bert = make_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    records = make_records(8, contexts=4)
    for record in records:
        # the second passage is the likeliest
        record["teacher_scores"] = [-2.0, -0.1, -3.0, -4.0]
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "out"
    run("train_dense.py", "--output_dir", out, "--train_data", path, "--loss", loss, "--group_size",
        4, "--query_encoder", bert, "--tie_encoders", "false", "--pooling_method", "mean",
        "--cos_temperature", 0.1, "--lr", 1e-3, "--weight_decay", 0, "--batch_size", 8,
        "--max_steps", 12, "--num_warmup_steps", 1, "--student_temperature", 0.05,
        "--teacher_temperature", 0.5, "--logging_steps", 12)
    before = load_file(f"{bert}/model.safetensors")
    for role in ("query", "key"):
        after = load_file(out / role / "model.safetensors")
        moved = [name for name in after if ".layer." in name and name in before
                 and not torch.equal(before[name], after[name])]
        assert len(moved) > 20, role
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert row["loss_curve"][-1] < 0.5 * row["loss_curve"][0]


# ---------------------------------------------------------------- recipes

READER_FLAGS = ("--max_length 60 --batch_size 8 --batch_size_val 8 --epochs 1 --lr 1e-3 "
                "--num_warmup_steps 1")
RETRIEVER_FLAGS = "--group_size 4 --batch_size 8 --max_steps 2 --lr 1e-3 --num_warmup_steps 1"


@pytest.fixture
def settings(small_world, tiny):  # noqa: F811
    """The settings that scripts/fid-kd.sh and scripts/lsr.sh share on the small world."""
    return {"TRAIN": small_world / "train.json", "DEV": small_world / "test.json",
            "TEST": small_world / "test.json", "CORPUS": small_world / "corpus.tsv",
            "MODEL": small_world / "bert", "READER_MODEL": tiny, "HITS": 6, "CONTEXTS": 3,
            "CUTOFFS": "1 5", "READER_FLAGS": READER_FLAGS, "COMPARE": "no"}


def test_fid_kd(settings, run_recipe, tmp_path):
    settings |= {"ROUNDS": 2, "SCORE_FLAGS": "--score_kind attention",
                 "RETRIEVER_FLAGS": "--loss fid-kd " + RETRIEVER_FLAGS}
    lines, _ = run_recipe("fid-kd.sh", code=-9, KILL_AT="--scores", **settings)
    assert stages_run(lines) == ["contexts0-train", "contexts0-dev", "contexts0-test", "reader0",
                                 "em0", "scores1"]
    lines, _ = run_recipe("fid-kd.sh", **settings)
    one_round = ["retriever{0}", "contexts{0}-train", "contexts{0}-dev", "contexts{0}-test",
                 "reader{0}", "em{0}"]
    assert stages_run(lines) == [name.format(1) for name in ["scores{0}", *one_round]] + [
        name.format(2) for name in ["scores{0}", *one_round]]
    table = lines[-4:]
    assert table[0].split() == ["nq@1", "nq@5", "em"]
    assert [line.split()[:2] for line in table[1:]] == [["round", name] for name in "012"]
    out = tmp_path / "out"
    measures = json.loads((out / "retrieval2.json").read_text())
    assert f"{100 * measures['nq@5']:.2f}" in table[3] and measures["method"] == "dense"

    # all hits are scored, the reader has read the first three of them in training
    scored = json.loads((out / "scored.1.jsonl").read_text().splitlines()[0])
    assert len(scored["ctxs"]) == 6 and "pos" not in json.dumps(scored["ctxs"])
    assert all("retrieval_score" in context for context in scored["ctxs"])
    lines, _ = run_recipe("fid-kd.sh", **settings)
    assert not stages_run(lines) and lines[-4:] == table
    _, errors = run_recipe("fid-kd.sh", code=1, **settings | {"TRAIN": "no.json"})
    assert len(errors) == 1 and "no.json: no such file" in errors[0]


def test_lsr_of_fedrags_records(settings, run_recipe, tmp_path):
    records = json.loads(settings["TRAIN"].read_text())
    fedrag = tmp_path / "fedrag.jsonl"
    rows = [{"query": record["question"], "response": record["answers"][0]} for record in records]
    fedrag.write_text("\n".join(map(json.dumps, rows)))
    settings |= {"TRAIN": fedrag, "ROUNDS": 2, "LM": ROOT / "toy" / "t5-tiny",
                 "SCORE_FLAGS": "--reader --answer best",
                 "RETRIEVER_FLAGS": f"--loss kl --teacher_temperature 0.5 {RETRIEVER_FLAGS}"}
    lines, _ = run_recipe("lsr.sh", code=-9, KILL_AT="--save_name lm", **settings)
    assert stages_run(lines) == ["contexts0-train", "contexts0-test", "scores1"]
    lines, _ = run_recipe("lsr.sh", **settings)
    assert stages_run(lines) == ["scores1", "retriever1", "contexts1-train", "contexts1-test",
                                 "scores2", "retriever2", "contexts2-train", "contexts2-dev",
                                 "contexts2-test", "reader2", "em2"]
    assert [line.split()[:2] for line in lines[-2:]] == [["round", "1"], ["round", "2"]]
    scored = json.loads((tmp_path / "out" / "contexts.1.train.scored.lm.jsonl").read_text()
                        .splitlines()[0])
    assert len(scored["teacher_scores"]) == len(scored["ctxs"]) == 6
    assert max(scored["teacher_scores"]) < 0


# ---------------------------------------------------------------- make demo-loop

# notes its arguments, writes the outputs that they name, and lets the last table alone be made
STAND_IN = """#!{python} -SE
import json, os, sys
args = sys.argv[1:]
if args[0].endswith("table.py"):
    if "--json" not in args:
        sys.exit()
    os.execv("{python}", ["{python}", *args])
with open("calls", "a") as file:
    print(*args, file=file)
value = {{"--measures": json.dumps({{"recall@1": 0.5, "recall@5": 0.6, "recall@20": 0.7}}),
          "--output": ""}}
if args[0].endswith("test.py"):
    value["--measures"] = json.dumps({{"em": 0.25}})
for flag in value:
    if flag in args:
        with open(args[args.index(flag) + 1], "w") as file:
            file.write(value[flag])
if args[0].endswith("world.py"):
    os.makedirs(args[2], exist_ok=True)
    for name in ("corpus.tsv", "train.json", "dev.json", "test.json", "labelled.json"):
        open(os.path.join(args[2], name), "w").close()
sys.exit(7 if os.environ.get("FAIL_AT", "nothing") in " ".join(args) else 0)
"""


@pytest.fixture
def demo_loop(tmp_path):
    """A function(code=0, **settings) that runs scripts/demo-loop.sh with stand-ins for the scripts
    and returns (finished process, the calls of scripts).
    """
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)

    def start(code=0, **settings):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"PYTHON": str(stand_in), "OUT": "out"} | settings
        process = subprocess.run(["sh", ROOT / "scripts" / "demo-loop.sh"], cwd=tmp_path, env=env,
                                 timeout=100, capture_output=True, text=True)
        assert process.returncode == code, process.stdout + process.stderr
        return process, (tmp_path / "calls").read_text().splitlines()
    return start


def test_the_demos_stages_and_table(demo_loop):
    process, calls = demo_loop(code=7, FAIL_AT="scored.2.jsonl", SEEDS="1 2")
    assert not any("out/2/" in call for call in calls)  # the second seed does not begin
    process, more_calls = demo_loop(SEEDS="1 2")
    table = process.stdout.splitlines()[-12:]
    assert table[0].split() == ["recall@1", "recall@5", "recall@20", "em"]
    ranker, = [line for line in table if line.startswith("a ranker")]
    assert "60.00" in ranker and ranker.split()[-1] == "-"  # no reader reads its order
    assert len([line for line in table if "60.00" in line and "25.00" in line]) == 7
    assert "mean of the seeds 1, 2" in process.stdout

    # what was done is not done again, and both seeds are trained alike
    first_seed = [call for call in calls + more_calls if "out/1/" in call]
    assert len(first_seed) == len(set(first_seed)) + 1  # the stage that failed
    second_seed = [call for call in more_calls if "out/2/" in call]
    assert sorted(set(first_seed)) == sorted(
        call.replace("out/2/", "out/1/").replace("--seed 2", "--seed 1") for call in second_seed)

    # no label reaches what is to be taught without
    for call in first_seed:
        if "out/1/fid-kd" in call or "out/1/lsr" in call or "out/1/start" in call:
            assert "labelled" not in call and "/gold" not in call and "qrels.train" not in call
    assert any("labelled" in call or "train.neg" in call for call in first_seed)
