"""Open causal language models: whole folders, or adapters that are merged into their model."""
import os
import re

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from layers.causal import depends_on_longest, why_not_packed
from training.adapters import merge_saved_adapters
from training.checkpoints import (
    CONSTANTS,
    announce_random_start,
    check_fit,
    check_shapes,
    drop_wrapper,
    find_base,
    find_model,
    find_weights,
    read_config,
    read_weights,
    refuse_gguf,
    refuse_quantised,
)
from utils import InputError, first_line, refusing, shorten


def is_causal(config):
    """Return True for the configuration of a causal language model.

    Encoders and encoder-decoders are excluded, although transformers can run some as causal models.
    """
    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING
    return (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in masked
            and not config.is_encoder_decoder)


def open_lm(path_or_name, dropout=None, dtype=torch.float32, trained=False):
    """Return the causal language model of a folder or hub name, with adapters merged in.

    `dropout` replaces the configuration's rates. With dtype None, weights keep the file's type.
    If the folder has no weights, the model is random, and a line is printed. Raise InputError
    for an unknown name, unreadable files, another architecture, wrong shapes, quantised weights
    and, if the model must be `trained`, for a folder without weights.
    """
    folder, weights = find_model(path_or_name)
    base = find_base(folder)
    if base != folder:
        return merge_saved_adapters(open_lm(base, dropout, dtype, trained=True), folder)
    config = read_config(folder, "causal language")
    if not is_causal(config) or weights is not None:
        raise InputError(f"{path_or_name}: is a {config.model_type} model, not a causal language "
                         "model; give the folder of one, such as GPT-2 or Llama")
    refuse_quantised(config, path_or_name)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):  # the text part of a model that also reads images
        config = config.get_text_config()
    if not find_weights(folder):
        refuse_gguf(folder)
    find_weights(folder, required=trained)
    weights = read_weights(folder)
    if dropout is not None:
        set_lm_dropout(config, dropout)
    with refusing(f"{path_or_name}: no causal language model can be built from its config.json and "
                  "weights", "give the folder of a trained model"):
        if weights is None:
            announce_random_start(path_or_name)
            model = kind(config).to(dtype)
        else:
            model = build_lm(kind, config, weights, path_or_name, dtype)
    freeze_other_parts(model)
    read_generation_config(folder, model)
    return model


def set_lm_dropout(config, rate):
    """Set all dropout rates of a configuration, under the names of any model family."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if name.endswith(("dropout", "pdrop")) and type(value) in (int, float):
                setattr(part, name, rate)


def build_lm(kind, config, weights, source, dtype):
    """Return a model of the class `kind` with this configuration and these weights.

    transformers converts weights that it stores in another form, such as experts' weights. Raise
    InputError, which names `source`, if names or shapes differ.
    """
    with torch.device("meta"):  # takes no memory; a wrong configuration could need any amount
        skeleton = kind(config)
    weights = rename_weights(drop_wrapper(weights, skeleton.state_dict(), source), skeleton)
    if count_entries(skeleton.state_dict()) > 2 * count_entries(weights):
        check_shapes(skeleton, weights, source)  # raises InputError before memory is exhausted
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # check_fit reports the same in one line
    try:
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    mismatched = [(name, tuple(given), tuple(expected))
                  for name, given, expected in loading["mismatched_keys"]]
    check_fit(loading["missing_keys"], mismatched, loading["unexpected_keys"], source)
    return model


def count_entries(weights):
    """Return the number of entries of all tensors of {name: weight}."""
    return sum(weight.numel() for weight in weights.values())


def freeze_other_parts(model):
    """Freeze the parts that text does not pass through, such as an image encoder."""
    if model.config is model.config.get_text_config():
        return
    used = {id(weight) for part in (model.get_decoder(), model.get_output_embeddings())
            for weight in part.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in used)


def read_generation_config(folder, model):
    """Give the model the settings of generation_config.json, if there is one.

    Raise InputError for an unreadable file, and for end tokens outside the vocabulary.
    """
    path = os.path.join(folder, "generation_config.json")
    if not os.path.exists(path):
        return
    with refusing(f"{path}: cannot be read", "delete it, or fetch it again"):
        settings = GenerationConfig.from_pretrained(folder)
        try:
            settings.validate(strict=True)
        except ValueError:  # transformers would refuse to save these settings
            settings = GenerationConfig(bos_token_id=settings.bos_token_id,
                                        eos_token_id=settings.eos_token_id,
                                        pad_token_id=settings.pad_token_id)
    ends, size = list_ids(settings.eos_token_id), model.get_input_embeddings().num_embeddings
    if not all(type(end) is int and 0 <= end < size for end in ends):
        raise InputError(f"{path}: eos_token_id must be ids below {size}, the size of the "
                         f"vocabulary, got {shorten(settings.eos_token_id)}; correct it")
    model.generation_config = settings


def list_ids(value):
    """Return a list of ids for one id, a list of ids, or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def rename_weights(weights, skeleton):
    """Return the weights under the names of the model.

    Files may lack the prefix (GPT-2's), name the output layer differently (GPT-NeoX's), hold
    constant buffers, or lack an output layer whose weights are the embedding's.
    """
    expected, prefix = skeleton.state_dict().keys(), f"{skeleton.base_model_prefix}."
    constant = "|".join([*(skeleton._keys_to_ignore_on_load_unexpected or []), CONSTANTS])
    named = {}
    for name, value in weights.items():
        if name not in expected:
            name = re.sub(r"^embed_out\.", "lm_head.", name)
        if name not in expected and prefix + name in expected:
            name = prefix + name
        if name in expected or not re.search(constant, name):
            named[name] = value
    for name, source in (skeleton.all_tied_weights_keys or {}).items():
        if name not in named and source in named:
            named[name] = named[source]
    return named


def open_causal_lm(path_or_name, device, dtype=torch.float32, longest=None):
    """Return (model, reason): the model in evaluation mode, and why it cannot take packed texts
    (why_not_packed), or None if it can.

    longest: tokens of the longest text to score, or None if unknown. Raise InputError as open_lm
    does, for a folder without weights, and for a model whose logits change when texts are
    padded.
    """
    model = open_lm(path_or_name, dtype=dtype, trained=True)
    model.to(device).eval()
    with refusing(f"{path_or_name}: its model cannot be run", "give the folder of a trained model"):
        reason = why_not_packed(model, longest)
    if reason and not depends_on_longest(model.config):
        check_padded(model, path_or_name)
    return model, reason


def probe_ids(config):
    """Return the 8 ids of a text to test a model with."""
    size = config.get_text_config().vocab_size
    return [(3 + 5 * i) % size for i in range(8)]


def differs(logits, expected):
    """Return True if logits differ from the expected ones by more than rounding errors.

    If the expected logits are not finite, return False: scoring and training report that.
    """
    if not expected.isfinite().all():
        return False
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    return not (logits - expected).abs().max() <= tolerance * expected.abs().max()


@torch.inference_mode()
def check_padded(model, source):
    """Raise InputError if padding on the right changes the logits of a text."""
    ids = probe_ids(model.config)
    problem = "padding changes the logits of a text"
    try:
        texts = [torch.tensor([part], device=model.device) for part in (ids, ids[:3])]
        whole, short = (model(input_ids=text, use_cache=False).logits[0] for text in texts)
        rows = torch.tensor([ids, ids[:3] + [0] * 5], device=model.device)
        padded = model(input_ids=rows, use_cache=False).logits
        if not differs(padded[0], whole) and not differs(padded[1, :3], short):
            return
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = first_line(error)
    raise InputError(f"{source}: a {model.config.model_type} model of transformers cannot score "
                     f"here ({problem}); choose another model, such as GPT-2, Llama or Qwen2")
