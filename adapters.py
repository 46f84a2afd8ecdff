"""Training on little memory: LoRA adapters (arXiv 2106.09685) beside frozen weights, which may be
packed into 4 bits (QLoRA, arXiv 2305.14314). Both need a package of their own, peft and
bitsandbytes.
"""
import copy
import logging
import warnings

import torch
from torch import nn

from utils import InputError, refusing

# on some CPUs bitsandbytes, which peft opens too, asks for a package that is of no use here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_packing(args):
    """Raises InputError for --load_in_4bit without --lora."""
    if args.load_in_4bit and not args.lora:
        raise InputError("--load_in_4bit freezes the weights: give --lora R, the adapters to train")


def add_lora(transformer, rank):
    """The transformer, frozen, with LoRA adapters of that rank on its linear layers.

    Raises InputError without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs the package peft: pip install peft") from None
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings(action="ignore"):  # of what peft finds out and sets right itself
        return get_peft_model(transformer, adapters)


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
