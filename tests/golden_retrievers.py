"""Recorded outputs of the original retrievers on random tiny models, and those models in the
originals' layouts.

karlstratos/minDPR ran on torch 1.10 and transformers 4.17, FiD's retriever on torch 1.6 and
transformers 3.0.2.
"""
import argparse
import json

import numpy as np
import torch

from conftest import ROOT

GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "retrievers.npz"))
CONFIG = {"model_type": "bert", "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
          "hidden_size": 32, "intermediate_size": 64, "layer_norm_eps": 1e-12,
          "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
          "vocab_size": 120, "pad_token_id": 0}


def weights_of(prefix):
    """{name: tensor} of the recorded weights below a prefix."""
    return {key.split("/", 1)[1]: torch.from_numpy(value) for key, value in GOLDEN.items()
            if key.startswith(prefix)}


def mindpr_file(folder):
    """minDPR's layout: sd and args, with bert-base-uncased beside it."""
    (folder / "bert-base-uncased").mkdir(parents=True)
    (folder / "bert-base-uncased" / "config.json").write_text(json.dumps(CONFIG))
    args = argparse.Namespace(model="model", num_hard_negatives_train=1)
    torch.save({"sd": weights_of("mindpr_weight/"), "args": args}, folder / "model")
    return folder / "model"


def dpr_file(folder):
    """DPR's released layout: model_dict with question_model and ctx_model, position_ids, the base
    model's name.
    """
    path = mindpr_file(folder)
    names = {"query_encoder.encoder.": "question_model.", "passage_encoder.encoder.": "ctx_model."}
    weights = {new + key[len(old):]: value for old, new in names.items()
               for key, value in weights_of("mindpr_weight/").items() if key.startswith(old)}
    weights |= {new + "embeddings.position_ids": torch.arange(64)[None] for new in names.values()}
    torch.save({"model_dict": weights, "optimizer_dict": {}, "scheduler_dict": {}, "offset": 0,
                "epoch": 3, "encoder_params": {"pretrained_model_cfg": "bert-base-uncased"}}, path)
    return path


def token_ids(ids, mask):
    """Recorded ids and attention mask (n, L) as lists of token ids."""
    return [row[keep].tolist() for row, keep in zip(torch.from_numpy(ids),
                                                    torch.from_numpy(mask).bool())]


def mindpr_queries():
    return token_ids(GOLDEN["mindpr/Q"], GOLDEN["mindpr/Q_mask"])


def mindpr_passages():
    return token_ids(GOLDEN["mindpr/P"], GOLDEN["mindpr/P_mask"])


class Ids:
    """A collator that hands token ids through."""

    def queries(self, texts, tasks):
        return texts

    keys = queries
