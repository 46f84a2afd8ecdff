"""LoRA adapters (arXiv 2106.09685) on frozen weights, for training with little memory.

The frozen weights may be quantised to 4 bits (QLoRA, arXiv 2305.14314). Adapters need the package
peft, 4 bits the package bitsandbytes.
"""
import copy
import logging
import math
import os
import warnings
from typing import NamedTuple

import torch
from torch import nn

from training.checkpoints import check_fit
from utils import InputError, refusing

# on some CPUs bitsandbytes, which peft imports, recommends a package that is not needed here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class LoraSettings(NamedTuple):
    """Hold how the adapters are made and how the frozen weights are stored."""
    rank: int
    alpha: float | None    # the adapters' output is scaled by alpha / rank; None: twice the rank
    dropout: float | None  # rate for the adapters' input; None: 0
    targets: list | None   # ends of layers' names; None: all linear layers except the output layer
    load_in_4bit: bool
    frozen_bf16: bool


# flags that have no effect without --lora
LORA_FLAGS = ("lora_alpha", "lora_dropout", "lora_targets", "frozen_bf16", "save_adapters",
              "load_in_4bit")


def add_lora_flags(add, switch=None):
    """Add the flags of LoRA with a group's add_argument; `switch`: options of boolean flags."""
    switch = switch or {"action": "store_true"}
    add("--lora", type=int, metavar="R",
        help="train LoRA adapters of rank R on frozen weights, merged when saved (needs the "
        "package peft); default: all weights are trained")
    add("--lora_alpha", type=float, metavar="A",
        help="scale the adapters' output by A / R; default: twice R")
    add("--lora_dropout", type=float, metavar="P",
        help="dropout rate of the adapters' input; default: 0")
    add("--lora_targets", nargs="+", metavar="NAME",
        help="linear layers that get adapters, given by the ends of their names, such as q_proj "
        "v_proj; default: all except the output layer")
    add("--load_in_4bit", default=False, **switch,
        help="keep the frozen weights under --lora in 4 bits (needs the package bitsandbytes)")
    add("--frozen_bf16", default=False, **switch,
        help="keep the frozen weights under --lora in bfloat16, half of float32's memory")


def read_lora_flags(flags):
    """Return the LoraSettings of {name of a flag: value}, or None without --lora.

    Raise InputError for values that are out of range, and for flags that need --lora or exclude
    each other.
    """
    rank, alpha, dropout = flags["lora"], flags["lora_alpha"], flags["lora_dropout"]
    for name in LORA_FLAGS:
        if flags.get(name) and not rank:
            raise InputError(f"--{name} is for adapters on frozen weights; add --lora R")
    if rank is not None and rank < 1:
        raise InputError(f"--lora must be >= 1, got {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"--lora_alpha must be > 0, got {alpha}")
    if dropout is not None and not 0 <= dropout < 1:
        raise InputError(f"--lora_dropout must be >= 0 and < 1, got {dropout}")
    if flags["load_in_4bit"] and flags["frozen_bf16"]:
        raise InputError("--load_in_4bit and --frozen_bf16 are two ways to store the frozen "
                         "weights; leave one out")
    if rank is None:
        return None
    return LoraSettings(rank, alpha, dropout, flags["lora_targets"], flags["load_in_4bit"],
                        flags["frozen_bf16"])


def prepare_lora(transformer, lora, device, bf16):
    """Return the frozen transformer with adapters, as the LoraSettings `lora` describe them.

    With load_in_4bit the weights are quantised on the device, and matrix products are computed in
    bfloat16 if `bf16`, else in float32. Raise InputError as pack_weights and add_lora do.
    """
    if lora.load_in_4bit:
        pack_weights(transformer, device, bf16)
    if lora.frozen_bf16:
        freeze_in_bf16(transformer)
    return add_lora(transformer, lora.rank, lora.alpha, lora.dropout, lora.targets)


def freeze_in_bf16(transformer):
    """Convert a transformer's weights to bfloat16, except those that must stay in float32."""
    kept = transformer._keep_in_fp32_modules or []
    for name, weight in transformer.named_parameters():
        if not any(part in kept for part in name.split(".")):
            weight.data = weight.data.bfloat16()


def add_lora(transformer, rank, alpha=None, dropout=None, targets=None):
    """Return the frozen transformer with adapters of that rank on its linear layers; see
    LoraSettings for the other arguments.

    Raise InputError without peft, and for targets that match no layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs the package peft: pip install peft") from None
    adapters = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout or 0.0,
                          target_modules=targets or "all-linear")
    with (warnings.catch_warnings(action="ignore"),  # about settings that peft corrects itself
          refusing("--lora: peft cannot add the adapters", "name layers of the model with "
                   "--lora_targets, or leave the flag out")):
        return get_peft_model(transformer, adapters)


def save_adapters(transformer, folder, base):
    """Write only the adapters, in peft's format; `base` is the model that they belong to."""
    config = transformer.peft_config["default"]
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    transformer.save_pretrained(folder)


def merge_saved_adapters(transformer, folder):
    """Return the transformer with the adapters of a folder merged into its weights.

    Raise InputError without peft, and for adapters of another model or of another kind than LoRA.
    """
    try:
        from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights
        from peft import set_peft_model_state_dict as set_adapters
    except ImportError:
        raise InputError(f"{folder}: holds adapters, which need the package peft: pip install peft "
                         "(or give the folder of the merged model)") from None
    with (warnings.catch_warnings(action="ignore"),
          refusing(f"{folder}: its adapters cannot be read", "fetch the folder again, or give the "
                   "folder of the merged model")):
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise InputError(f"{folder}: holds {config.peft_type} adapters, but only LoRA adapters "
                             "can be merged; give the folder of a whole model")
        trained = {name for name, weight in transformer.named_parameters() if weight.requires_grad}
        model = get_peft_model(transformer, config)
        loading = set_adapters(model, load_peft_weights(folder, device="cpu"))
        missing = [name for name in loading.missing_keys if "lora_" in name]
        check_fit(missing, [], loading.unexpected_keys, folder)
        merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():  # peft has frozen all weights
        weight.requires_grad_(name in trained)
    return merged


def pack_weights(transformer, device, bf16):
    """Quantise the weights of a transformer's linear layers to 4 bits (NF4 with double
    quantisation, QLoRA section 3); they are not trained.

    The output layer is not quantised, nor are layers that transformers keeps in float32, such as
    T5's `wo`, because T5 converts its input to the type of the weight. Matrix products are computed
    in bfloat16 or float32. Raise InputError without bitsandbytes, for a model without linear
    layers, and if bitsandbytes does not support the device.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise InputError("--load_in_4bit needs the package bitsandbytes: pip install "
                         "bitsandbytes") from None
    kept = set(transformer._keep_in_fp32_modules or [])
    layers = {name: layer for name, layer in transformer.base_model.named_modules()
              if type(layer) is nn.Linear and not kept.intersection(name.split("."))}
    if not layers:
        raise InputError(f"--load_in_4bit: a {transformer.config.model_type} model of transformers "
                         "has no linear layers to quantise; leave the flag out")
    dtype = torch.bfloat16 if bf16 else torch.float32
    with refusing(f"--load_in_4bit: bitsandbytes cannot quantise weights on this {device.type}",
                  "leave the flag out, or run on a GPU that bitsandbytes supports"):
        for name, layer in layers.items():
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype,
                quant_type="nf4", device="meta")
            packed.weight = bitsandbytes.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4").to(device)
            packed.bias = layer.bias
            # otherwise, on some CPUs, the first evaluation repacks the weights and rounds scales
            packed.support_avx512bf16_for_cpu = False
            transformer.base_model.set_submodule(name, packed)
    transformer.is_loaded_in_4bit = True  # peft reads this attribute


def is_packed(module):
    """Return True if the module holds 4-bit weights."""
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


def copy_to_cpu(module):
    """Return a copy of a module on the CPU, since a GPU may not have room for two; 4-bit weights
    are copied on their own device.
    """
    tensors = [*module.parameters(), *module.buffers()]
    copies = {id(tensor): copy_tensor(tensor) for tensor in tensors
              if not hasattr(tensor, "quant_state")}
    return copy.deepcopy(module, copies)  # copies is deepcopy's memo of finished copies


def copy_tensor(tensor):
    """Return a copy of a weight or a buffer on the CPU."""
    copied = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    return copied


def unload_adapters(transformer):
    """Return the transformer that add_lora was given, with the adapters merged into its weights;
    4-bit weights become float32 on the CPU.
    """
    for name, layer in list(transformer.named_modules()):
        if hasattr(layer, "get_delta_weight") and is_packed(layer.base_layer):
            transformer.set_submodule(name, merge_packed(layer))
    return transformer.merge_and_unload()


def merge_packed(layer):
    """Return a 4-bit layer and its adapter as one float32 linear layer on the CPU."""
    from bitsandbytes.functional import dequantize_4bit
    base = layer.base_layer
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float().cpu()
    weight = weight + layer.get_delta_weight("default").float().cpu()
    merged = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    merged.weight = nn.Parameter(weight)
    if base.bias is not None:
        merged.bias = nn.Parameter(base.bias.detach().cpu())
    return merged
