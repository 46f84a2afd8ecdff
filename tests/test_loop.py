"""FiD-KD and LSR: what teaches the retriever arrives there, and their recipes on small files."""
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from conftest import ROOT, make_bert, make_records, make_t5, run
from model import FiDT5
from test_loop_recipes import run_recipe, small_world, stages_run  # noqa: F401

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
    _, scores = reader.generate(ids, mask, 3, return_scores="attention")

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
    _, logits = reader.generate(ids, mask, 3, return_scores=True)
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
        "--max_steps", 12, "--num_warmup_steps", 1, "--student_temperature", 0.5,
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
            "CUTOFFS": "1 5", "READER_FLAGS": READER_FLAGS}


def test_fid_kd(settings, run_recipe, tmp_path):  # noqa: F811
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


def test_lsr_of_fedrags_records(settings, run_recipe, tmp_path):  # noqa: F811
    records = json.loads(settings["TRAIN"].read_text())
    fedrag = tmp_path / "fedrag.jsonl"
    rows = [{"query": record["question"], "response": record["answers"][0]} for record in records]
    fedrag.write_text("\n".join(map(json.dumps, rows)))
    settings |= {"TRAIN": fedrag, "ROUNDS": 2, "LM": ROOT / "toy" / "t5-tiny",
                 "SCORE_FLAGS": "--fid --answer best",
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
