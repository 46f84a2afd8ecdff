"""What the tests share: a tiny random T5 folder, records, and running the scripts as a user does."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
TOKENIZER = ROOT / "toy" / "t5-tiny"


def make_t5(folder, **changes):
    """A T5 folder with random weights and the toy tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    settings = dict(vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, num_decoder_layers=2,
                    decoder_start_token_id=0, dropout_rate=0.1)
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**settings | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WORDS = """who wrote it the a of to in and cradle baker stood town letter names river born where is was hobby did keep which animal
lives with this one other two three""".split()


def make_bert(folder, **changes):
    """A BERT folder with random weights, large ones, so that texts differ, and a small WordPiece vocabulary of words and letters."""
    letters = [chr(i) for i in range(97, 123)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(x for x in letters if x not in WORDS), *("##" + x for x in letters)]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=64)
    settings = dict(vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                    max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    torch.manual_seed(0)
    BertModel(BertConfig(**settings | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_records(count, contexts=3, seed=0):
    """Records of the embedded world, small."""
    import world
    rng = random.Random(seed)
    entities, people = world.make_entities(rng, 40, 20, held_out=False)
    passages = [p for e in entities for p in world.write_passages(rng, e, people)]
    for i, p in enumerate(passages):
        p["id"] = str(i)
    return world.make_records(rng, "r", entities, world.OverlapRanker(passages, 0.1), count, top_k=contexts)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return str(make_t5(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps(make_records(11)))
    return str(path)


def command(script, *args, processes=1):
    """The command line of a script, under torchrun where there are several processes."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"]
    return launch + [str(ROOT / script), *map(str, args)]


def run(script, *args, processes=1, code=0, **more):
    """Runs a script and returns (stdout, stderr); fails the test if the exit code is another one."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command(script, *args, processes=processes), capture_output=True, text=True, env=env, timeout=300, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr
