"""Training on little memory: LoRA adapters (arXiv 2106.09685) beside frozen weights, which may be
packed into 4 bits (QLoRA, arXiv 2305.14314). Both need a package of their own, peft and
bitsandbytes.
"""
import copy
import logging
import os
import warnings

import torch
from torch import nn

from training.checkpoints import check_fit
from utils import InputError, check_at_least, check_positive, refusing

# on some CPUs bitsandbytes, which peft opens too, asks for a package that is of no use here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# the flags that say how adapters are made, for those that need --lora
LORA_FLAGS = ("lora_alpha", "lora_dropout", "lora_targets", "frozen_bf16", "save_adapters",
              "load_in_4bit")
ALL_LINEAR = "all-linear"


def add_lora_flags(add, switch=None):
    """Add the flags of LoRA to a group, by its function; `switch` are the options of a switch."""
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


def check_lora(args):
    """Raise InputError for flags of adapters that cannot work, or without --lora."""
    for name in LORA_FLAGS:
        if getattr(args, name, None) and not args.lora:
            raise InputError(f"--{name} is for adapters on frozen weights: give --lora R, too")
    check_at_least(args, {"lora": 1})
    if args.lora_alpha is not None:
        check_positive(args, ["lora_alpha"])
    if args.lora_dropout is not None and not 0 <= args.lora_dropout < 1:
        raise InputError("--lora_dropout must be 0 or more and below 1, it is "
                         f"{args.lora_dropout}")
    if args.load_in_4bit and args.frozen_bf16:
        raise InputError("--load_in_4bit and --frozen_bf16 are two ways to keep the frozen "
                         "weights; leave one out")


def freeze_in_bf16(transformer):
    """Convert the weights of a transformer to bfloat16; they are not trained."""
    kept = transformer._keep_in_fp32_modules or []
    for name, weight in transformer.named_parameters():
        if not any(part in kept for part in name.split(".")):
            weight.data = weight.data.bfloat16()


def add_lora(transformer, rank, alpha=None, dropout=None, targets=None):
    """Return the transformer, frozen, with LoRA adapters of that rank on linear layers.

    alpha: adapters count alpha / rank, twice the rank if None; targets: the ends of the layers'
    names, all but the output layer if None. Raise InputError without peft, and for targets that no
    layer has.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs the package peft: pip install peft") from None
    adapters = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout or 0.0,
                          target_modules=targets or ALL_LINEAR)
    with (warnings.catch_warnings(action="ignore"),  # about what peft corrects itself
          refusing("--lora: peft cannot add the adapters", "name layers that the model has with "
                   "--lora_targets, or leave the flag out")):
        return get_peft_model(transformer, adapters)


def prepare_lora(transformer, args, device):
    """Return the transformer with the LoRA adapters of add_lora_flags; its weights are frozen, and
    packed on the device with --load_in_4bit. Raise InputError as add_lora.
    """
    if args.load_in_4bit:
        pack_weights(transformer, device, args.bf16)
    if args.frozen_bf16:
        freeze_in_bf16(transformer)
    return add_lora(transformer, args.lora, args.lora_alpha, args.lora_dropout, args.lora_targets)


def save_adapters(transformer, folder, base):
    """Write the adapters of add_lora alone, as peft does; `base` is the model that they belong to.
    """
    config = transformer.peft_config["default"]
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    transformer.save_pretrained(folder)


def merge_saved_adapters(transformer, folder):
    """Return the transformer with the adapters of a folder merged into its weights, of which those
    are trained that were before.

    Raise InputError without peft, and for adapters of another model or another kind than LoRA.
    """
    try:
        from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights
        from peft import set_peft_model_state_dict as set_adapters
    except ImportError:
        raise InputError(f"{folder}: holds adapters of peft, which need the package peft: pip "
                         "install peft (or give the folder of the merged model)") from None
    with (warnings.catch_warnings(action="ignore"),
          refusing(f"{folder}: its adapters cannot be read", "fetch the folder again, or give that "
                   "of the merged model")):
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise InputError(f"{folder}: holds {config.peft_type} adapters, and only LoRA's can be "
                             "merged; give the folder of a whole model")
        trained = {name for name, weight in transformer.named_parameters() if weight.requires_grad}
        model = get_peft_model(transformer, config)
        loading = set_adapters(model, load_peft_weights(folder, device="cpu"))
        missing = [name for name in loading.missing_keys if "lora_" in name]
        check_fit(missing, [], loading.unexpected_keys, folder)
        merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():  # peft has frozen all of them
        weight.requires_grad_(name in trained)
    return merged


def pack_weights(transformer, device, bf16):
    """Packs the weights of a transformer's linear layers into 4 bits (NF4 with double quantization:
    QLoRA, section 3), but for its head's and those that transformers keeps in float32 (T5's `wo`,
    whose type its input is converted to); they are not trained. Products are computed in bfloat16
    or float32.

    Raises InputError without bitsandbytes, without linear layers, and where the device cannot.
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
                         "has no linear layers that could be packed; leave it out")
    dtype = torch.bfloat16 if bf16 else torch.float32
    with refusing(f"--load_in_4bit: bitsandbytes cannot pack weights on this {device.type}",
                  "leave it out, or run on a GPU that it knows"):
        for name, layer in layers.items():
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype,
                quant_type="nf4", device="meta")
            packed.weight = bitsandbytes.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4").to(device)
            packed.bias = layer.bias
            # else some CPUs, at the first evaluation, pack the weights anew and round their scales
            packed.support_avx512bf16_for_cpu = False
            transformer.base_model.set_submodule(name, packed)
    transformer.is_loaded_in_4bit = True  # peft asks for it


def is_packed(module):
    """True if weights of the module are packed into 4 bits."""
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


def copy_to_cpu(module):
    """A copy of a module on the CPU, whatever device it is on: there a second one may not fit. What
    is packed into 4 bits stays where it is.
    """
    tensors = [*module.parameters(), *module.buffers()]
    copies = {id(tensor): copy_tensor(tensor) for tensor in tensors
              if not hasattr(tensor, "quant_state")}
    return copy.deepcopy(module, copies)  # a memo of what has been copied already


def copy_tensor(tensor):
    """A copy of a weight or a buffer on the CPU."""
    copied = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    return copied


def unload_adapters(transformer):
    """The transformer that add_lora was given, with the adapters merged into its weights; packed
    ones become the float32 numbers that they stand for, on the CPU.
    """
    for name, layer in list(transformer.named_modules()):
        if hasattr(layer, "get_delta_weight") and is_packed(layer.base_layer):
            transformer.set_submodule(name, merge_packed(layer))
    return transformer.merge_and_unload()


def merge_packed(layer):
    """The plain linear layer of an adapter and the packed layer that it adapts."""
    from bitsandbytes.functional import dequantize_4bit
    base = layer.base_layer
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float().cpu()
    weight = weight + layer.get_delta_weight("default").float().cpu()
    merged = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    merged.weight = nn.Parameter(weight)
    if base.bias is not None:
        merged.bias = nn.Parameter(base.bias.detach().cpu())
    return merged
