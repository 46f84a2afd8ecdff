"""Open retrievers and rankers from all their layouts, and save them as folders.

    layout                            opened by            recognised by
    ours, sentence-transformers'      open_encoder         modules.json
    ours with two encoders            open_encoders        folder/query and folder/key
    transformers'                     open_encoder         no modules.json: no head
    DPR's encoders, as on the hub     open_dpr_folder      model_type dpr in config.json
    FiD's distilled retriever         open_fid_retriever   indexing_dimension in config.json
    minDPR's file, DPR's file         open_dpr_file        a file instead of a folder
    a ranker, ours or transformers'   open_ranker          the flag --ranker

A saved retriever opens with sentence_transformers.SentenceTransformer(folder) and AutoModel; a
retriever of two encoders opens from folder/query and folder/key. FiD's retriever does not fit that
layout and is saved in its own. A ranker opens with sentence_transformers.CrossEncoder(folder).
"""
import os
from contextlib import contextmanager

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    LongT5EncoderModel,
    MT5EncoderModel,
    T5EncoderModel,
    UMT5EncoderModel,
)

from dense.description import (
    POOLING,
    POOLING_FLAGS,
    SIMILARITY,
    find_path,
    first_architecture,
    read_description,
    read_descriptions,
)
from dense.text_encoder import Normalize, TextEncoder
from records.files import write_json
from records.reading import read_args, read_settings, to_number
from training.checkpoints import (
    announce_random_start,
    check_fit,
    check_shapes,
    drop_wrapper,
    find_model,
    find_weights,
    find_wrapper,
    fit_weights,
    log_on_main,
    read_config,
    read_weights,
)
from utils import InputError, refusing, shorten

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate",
            "attention_dropout")
# activations of Dense modules and rankers, by their names in torch.nn
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish",
               "Softplus")
# encoder-decoder models, whose encoder alone makes vectors, as in sentence-transformers
ENCODER_CLASSES = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel,
                   "longt5": LongT5EncoderModel}
# more such models in sentence-transformers, which are refused here
OTHER_ENCODERS = ("blenderbot", "blenderbot-small", "m2m_100", "marian", "moonshine", "pegasus",
                  "pegasus_x", "prophetnet", "switch_transformers", "t5gemma", "t5gemma2", "udop",
                  "whisper")
# vectors do not depend on the pooler; checkpoints of sentence-transformers and DPR leave it out
POOLER = r"(^|\.)pooler\."
# prefixes of weights' names: (minDPR's file, DPR's file), and DPR's two encoders on the hub
QUERY_PREFIXES = ("query_encoder.encoder.", "question_model.")
KEY_PREFIXES = ("passage_encoder.encoder.", "ctx_model.")
HUB_PREFIXES = ("question_encoder.", "ctx_encoder.")


# ---------------------------------------------------------------- opening

def open_encoders(name, key_name=None, pooling=None, dropout=None, trained=False,
                  truncate_dim=None):
    """Return (query encoder, key encoder or None if one serves both, {metric, temperature,
    separator} as far as the checkpoint's files set them).

    For the arguments see BiEncoder.open. Raises InputError.
    """
    name = find_path(name)
    descriptions = read_descriptions(name, key_name)
    query, key = descriptions["query"], descriptions["key"]
    stated = {"metric": query.metric}
    if os.path.isfile(name):
        query_encoder, key_encoder = open_dpr_file(name, dropout)
        for encoder in (query_encoder, key_encoder):
            encoder.pooling = pooling or encoder.pooling
    else:
        query_encoder = open_encoder(query, pooling, dropout, trained)
        key_encoder = None
        if key is not query:
            key_encoder = open_encoder(key, pooling, dropout, trained)
        if query_encoder.head_first:  # FiD's scores are dot / sqrt(d)
            stated["temperature"] = query_encoder.model.config.indexing_dimension ** 0.5
    for encoder, description in ((query_encoder, query), (key_encoder, key)):
        if encoder is not None:
            encoder.truncate_dim = truncate_dim or description.truncate_dim
            encoder.lowercases = description.lowercases
            encoder.skips_prompt = description.skips_prompt
    if key is query and os.path.isdir(query.folder) and is_dpr(query.folder):
        log_on_main(f"note: {query.folder} is one of DPR's two encoders; it encodes queries and "
                    "documents unless --key_encoder names the context encoder")
    dimensions = {encoder.dimension for encoder in (query_encoder, key_encoder) if encoder}
    if len(dimensions) > 1:
        raise InputError(f"{name} gives vectors of {query_encoder.dimension} numbers, {key_name} "
                         f"of {key_encoder.dimension}; give two encoders that were trained "
                         "together")
    return query_encoder, key_encoder, stated | read_retriever_args(name)


def is_dpr(folder):
    """Return whether a folder holds one of DPR's two encoders in the hub's layout."""
    return read_config(folder, "encoder").model_type == "dpr"


def read_retriever_args(name):
    """Return {metric, temperature, separator} as far as a retriever's args.json stores them.

    Raises InputError for impossible values, and for a reader's args.json.
    """
    args = read_args(name)
    if "dev_em" in args:
        raise InputError(f"{name}: is a reader, which train_epoch.py has written; give the folder "
                         "of a retriever or an encoder")
    stated = args.get("retriever", {})
    path = os.path.join(name, "args.json")
    with refusing(f"{path}: its 'retriever' is not metric, temperature and separator",
                  "correct it"):
        if stated.get("metric", "cos") not in SIMILARITY:
            raise ValueError(f"metric {shorten(stated['metric'])}")
        if to_number(stated.get("temperature", 1)) <= 0:
            raise ValueError(f"temperature {shorten(stated['temperature'])}")
        if type(stated.get("separator")) not in (int, type(None)):
            raise ValueError(f"separator {shorten(stated['separator'])}")
    return stated


def open_encoder(description, pooling=None, dropout=None, trained=False):
    """Return the TextEncoder of a folder with one encoder, by its Description or its path."""
    if not hasattr(description, "folder"):
        description = read_description(description)
    folder = description.folder
    config = read_config(folder, "encoder").to_dict()
    with refusing(f"{folder}: cannot be opened as an encoder", "give the folder of a retriever or "
                  "an encoder, or fetch it again"):
        if "indexing_dimension" in config:
            return open_fid_retriever(folder, config, dropout)
        if config["model_type"] == "dpr":
            if description.has_modules:
                raise InputError(f"{folder}: is DPR's encoder of the hub with a modules.json, "
                                 "which sentence-transformers cannot open; delete modules.json")
            return open_dpr_folder(folder, config, dropout)
        model = open_transformer(folder, dropout, trained)
        layers = [layer for kind, head_folder in description.heads
                  for layer in open_head(kind, head_folder)]
        encoder = TextEncoder(model, pooling or description.pooling, nn.Sequential(*layers))
        # fails now if the sizes of its layers do not match
        encoder.head(torch.zeros(1, encoder.pooled_dimension))
        return encoder


def open_transformer(folder, dropout=None, trained=False):
    """Return the transformer of a folder in float32.

    For a folder without weights, logs a note and uses random ones; with `trained`, raises
    InputError. Also raises it for a file that lacks some of the transformer's weights.
    """
    config = read_config(folder, "encoder")
    if config.model_type in OTHER_ENCODERS:
        raise InputError(f"{folder}: a {config.model_type} model is not supported; use one that "
                         "encodes texts")
    set_encoder_dropout(config, dropout)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    kind = ENCODER_CLASSES.get(config.model_type, AutoModel)
    if not find_weights(folder, required=trained):
        announce_random_start(folder)
        return AutoModel.from_config(config) if kind is AutoModel else kind(config)
    model, loading = load_transformer(kind, folder, config)
    check_fit(loading["missing_keys"], loading["mismatched_keys"], loading["unexpected_keys"],
              folder, POOLER, unused_is_fine=True)
    return model


def load_transformer(kind, folder, config):
    """Return (the model of a class of transformers in float32, transformers' loading info).

    If weights are missing because a wrapper has put a prefix before all names, drop the prefix.
    """
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True,
                "ignore_mismatched_sizes": True}  # check_fit refuses them by name
    with quiet_transformers():
        model, loading = kind.from_pretrained(folder, **settings)
        if any("pooler." not in name for name in loading["missing_keys"]):
            weights, expected = read_weights(folder), model.state_dict()
            # transformers drops the prefix of the class itself
            if find_wrapper(weights, expected) not in ("", f"{model.base_model_prefix}."):
                weights = drop_wrapper(weights, expected, folder)
                model, loading = type(model).from_pretrained(None, state_dict=weights, **settings)
    return model, loading


@contextmanager
def quiet_transformers():
    """Silence transformers' own report of weights that do not fit, which check_fit replaces."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def set_encoder_dropout(config, dropout):
    """Set every dropout rate of the configuration; None leaves them unchanged."""
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            setattr(config, name, dropout)


def open_head(kind, folder):
    """Return the torch layers of a Dense, LayerNorm or Normalize module of sentence-transformers.

    Raises InputError.
    """
    if kind == "Normalize":
        return [Normalize()]
    path = os.path.join(folder, "config.json")
    config = read_settings(path)
    weights = read_weights(folder) if os.path.isdir(folder) else None
    if weights is None:
        raise InputError(f"{folder}: a {kind} module without weights; fetch the folder again")
    weights = {name: value.float() for name, value in weights.items()}
    if kind == "LayerNorm":
        layer, prefix, activation = nn.LayerNorm(config["dimension"]), "norm.", None
    else:
        if config.get("use_residual"):
            raise InputError(f"{path}: use_residual is not supported")
        activation = open_activation(config.get("activation_function", "torch.nn.Tanh"), path)
        layer = nn.Linear(config["in_features"], config["out_features"],
                          bias=config.get("bias", True))
        prefix = "linear."
    expected = {prefix + name: value for name, value in layer.state_dict().items()}
    weights = fit_weights(weights, expected, folder)
    layer.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
    return [layer] if activation is None else [layer, activation]


def open_activation(name, path):
    """Return the torch layer of an activation's name, or None for Identity.

    Raises InputError with `path` for an unknown name.
    """
    kind = str(name).split(".")[-1]
    if not str(name).startswith("torch.") or kind not in ACTIVATIONS:
        raise InputError(f"{path}: the activation {shorten(name)} is not supported; use one of "
                         f"torch.nn's {', '.join(ACTIVATIONS)}")
    return None if kind == "Identity" else getattr(nn, kind)()


def open_dpr_file(path, dropout=None):
    """Return (query encoder, key encoder) of minDPR's file, whose weights are named
    'query_encoder.encoder.'..., or of DPR's ('question_model.'...).
    """
    folder, weights = find_model(path)
    with refusing(f"{path}: cannot be opened as minDPR's or DPR's file", "fetch it again"):
        config = read_config(folder, "encoder")
        query_encoder = build_dpr_encoder(config, weights, QUERY_PREFIXES, path, dropout)
        key_encoder = build_dpr_encoder(config, weights, KEY_PREFIXES, path, dropout)
        return query_encoder, key_encoder


def open_dpr_folder(folder, config, dropout=None):
    """Return the TextEncoder of DPR's question or context encoder in the hub's layout.

    Its vectors equal those of transformers' DPRQuestionEncoder and DPRContextEncoder: the first
    token's state, projected if projection_dim is not 0. Raises InputError.
    """
    find_weights(folder, required=True)
    if config.get("projection_dim", 0) < 0:
        raise InputError(f"{folder}: projection_dim must be >= 0, got "
                         f"{config['projection_dim']}")
    shape = {name: value for name, value in config.items()
             if name not in ("model_type", "architectures", "projection_dim")}
    encoder = build_dpr_encoder(BertConfig(**shape), read_weights(folder), HUB_PREFIXES, folder,
                                dropout)
    if len(encoder.head) != (config.get("projection_dim", 0) > 0):
        raise InputError(f"{folder}: its weights have {'a' if len(encoder.head) else 'no'} "
                         "projection, but projection_dim in config.json is "
                         f"{config.get('projection_dim', 0)}; fetch it again")
    return encoder


def build_dpr_encoder(config, weights, prefixes, path, dropout):
    """Return the TextEncoder of the weights whose names begin with one of the prefixes. DPR's
    encoders may have a projection as their head.
    """
    bert_weights, projection = {}, {}
    for prefix in prefixes:
        for name, value in weights.items():
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix).removeprefix("bert_model.")
            if name.startswith("encode_proj."):
                projection[name.removeprefix("encode_proj.")] = value.float()
            else:
                bert_weights[name] = value
    if not bert_weights:
        raise InputError(f"{path}: has no weights named {prefixes[0]}... or {prefixes[1]}...; is "
                         "it a bi-encoder of minDPR or DPR?")
    encoder = TextEncoder(build_bert(config, bert_weights, path, dropout))
    if projection:
        out_features, in_features = projection["weight"].shape
        layer = nn.Linear(in_features, out_features)
        layer.load_state_dict(projection)
        encoder.head.append(layer)
    return encoder


def build_bert(config, weights, source, dropout=None):
    """Return the transformer of a configuration with these weights.

    Raises InputError with `source` if they do not fit.
    """
    set_encoder_dropout(config, dropout)
    model = AutoModel.from_config(config)
    if not any(name.startswith("pooler.") for name in weights):
        model.pooler = None
    weights = {name: value.float() for name, value in weights.items()
               if not name.endswith("position_ids")}  # a constant in old checkpoints
    check_shapes(model, weights, source)
    model.load_state_dict(weights)
    return model


def open_fid_retriever(folder, config, dropout=None):
    """Return FiD's distilled retriever (arXiv 2012.04584): BERT, a projection and norm of each
    token, then the mean over all positions or over the real tokens.

    Raises InputError for different masks of questions and passages, which share one encoder.
    """
    weights = read_weights(folder)
    if weights is None or config["apply_question_mask"] != config["apply_passage_mask"]:
        raise InputError(f"{folder}: an FiD retriever needs weights, and the same "
                         "apply_question_mask as apply_passage_mask")
    bert_weights = {name.removeprefix("model."): value for name, value in weights.items()
                    if name.startswith("model.")}
    bert = build_bert(read_config(folder, "encoder"), bert_weights, folder, dropout)
    encoder = TextEncoder(bert, "cls" if config["extract_cls"] else "mean")
    encoder.head_first = True
    dimension = config["indexing_dimension"]
    if config["projection"]:
        encoder.head = nn.Sequential(nn.Linear(config["hidden_size"], dimension),
                                     nn.LayerNorm(dimension))
        for layer, name in zip(encoder.head, ("proj", "norm")):
            layer.load_state_dict({"weight": weights[f"{name}.weight"],
                                   "bias": weights[f"{name}.bias"]})
    if not config["apply_passage_mask"]:
        encoder.pad_to = {"query": config["question_maxlength"], "key": config["passage_maxlength"]}
    return encoder


# ---------------------------------------------------------------- rankers

def open_ranker(name, dropout=None, trained=False):
    """Return (transformers' sequence classifier with one score, the activation of its scores or
    None). For the arguments see CrossEncoder.open.

    Raises InputError.
    """
    folder = find_model(name)[0]
    check_ranker(folder)
    config = read_config(folder, "ranker or encoder")
    architecture = first_architecture(config.architectures)
    is_ranker = architecture.endswith("ForSequenceClassification")
    if is_ranker and config.num_labels != 1:
        raise InputError(f"{folder}: num_labels must be 1, one score per pair, got "
                         f"{config.num_labels}")
    if trained and architecture.endswith("ForCausalLM"):
        raise InputError(f"{folder}: is a causal language model, not a ranker with one score; "
                         "train one with train_dense.py --ranker")
    config.num_labels = 1
    set_encoder_dropout(config, dropout)
    has_weights = find_weights(folder, required=trained)
    with refusing(f"{folder}: cannot be opened as a ranker with one score", "give the folder of a "
                  "ranker or an encoder"):
        activation = read_ranker_activation(folder, config)
        config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        if not has_weights:
            announce_random_start(folder)
            return AutoModelForSequenceClassification.from_config(config), activation
        model, loading = load_transformer(AutoModelForSequenceClassification, folder, config)
        missing = loading["missing_keys"]
        # the ranking head, which an encoder lacks
        head = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")
                or "pooler." in name]
        if trained and head and len(head) == len(missing):
            raise InputError(f"{folder}: is not a ranker, it has no {min(head)}; train one with "
                             "train_dense.py --ranker")
        check_fit([name for name in missing if name not in head], loading["mismatched_keys"],
                  loading["unexpected_keys"], folder, unused_is_fine=True)
        if head:
            log_on_main(f"note: {folder}: no {min(head)}: the ranking head is random")
    return model, activation


def check_ranker(folder):
    """Raise InputError for settings of sentence-transformers' CrossEncoder that would change its
    scores and are not supported here.
    """
    path = os.path.join(folder, "modules.json")
    modules = [str(module.get("type")).split(".")[-1] for module in read_settings(path, list)
               if isinstance(module, dict)]
    transformer = read_settings(os.path.join(folder, "sentence_bert_config.json"))
    settings = read_settings(os.path.join(folder, "config_sentence_transformers.json"))
    if settings.get("model_type") == "CrossEncoder":
        task = transformer.get("transformer_task", "sequence-classification")
        if modules != ["Transformer"] or task != "sequence-classification":
            raise InputError(f"{path}: a ranker of {', '.join(modules)} ({shorten(task)}) is not "
                             "supported; use one that is a sequence classifier")
        if (settings.get("prompts") or {}).get(settings.get("default_prompt_name")):
            raise InputError(f"{folder}: a ranker with a prompt (default_prompt_name) is not "
                             "supported")


def read_ranker_activation(folder, config):
    """Return the activation that sentence-transformers applies to a ranker's scores, as a torch
    layer, or None for the identity.

    The default is the sigmoid. Our own rankers are trained on raw scores and have none. Raises
    InputError for an unknown name.
    """
    settings = read_settings(os.path.join(folder, "config_sentence_transformers.json"))
    stated = settings.get("activation_fn")
    if stated is None:
        stated = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    if stated is None:
        stated = getattr(config, "sbert_ce_default_activation_function", None)
    if stated is None and "retriever" in read_args(folder):
        return None
    return open_activation(stated or "torch.nn.Sigmoid", os.path.join(folder, "config.json"))


# ---------------------------------------------------------------- saving

def save_encoder(folder, encoder, metric, max_length, prompts):
    """Write an encoder as a sentence-transformers folder, or FiD's retriever in FiD's layout."""
    if encoder.head_first:
        save_fid_retriever(folder, encoder)
        return
    encoder.model.save_pretrained(folder)
    write_json(os.path.join(folder, "1_Pooling", "config.json"), describe_pooling(encoder))
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    layers = list(encoder.head)
    if metric == "cos" and not (layers and isinstance(layers[-1], Normalize)):
        layers.append(Normalize())
    for layer, activation in pair_activations(layers):
        kind = {nn.Linear: "Dense", nn.LayerNorm: "LayerNorm"}.get(type(layer), "Normalize")
        path = f"{len(modules)}_{kind}"
        save_head(os.path.join(folder, path), layer, activation)
        modules.append((kind, path))

    listed = []
    for index, (kind, path) in enumerate(modules):
        listed.append({"idx": index, "name": str(index), "path": path,
                       "type": f"sentence_transformers.models.{kind}"})
    write_json(os.path.join(folder, "modules.json"), listed)
    write_json(os.path.join(folder, "sentence_bert_config.json"),
               {"max_seq_length": max_length,
                "do_lower_case": encoder.lowercases})
    settings = {"similarity_fn_name": SIMILARITY[metric], "prompts": prompts}
    if encoder.truncate_dim is not None:
        settings["truncate_dim"] = encoder.truncate_dim
    write_json(os.path.join(folder, "config_sentence_transformers.json"), settings)


def describe_pooling(encoder):
    """Return the configuration of an encoder's Pooling module, in the form that all versions of
    sentence-transformers read.
    """
    modes = [POOLING[name] for name in encoder.pooling.split("+")]
    config = {"word_embedding_dimension": encoder.model.config.hidden_size,
              "include_prompt": not encoder.skips_prompt}
    config |= {name: mode in modes for name, mode in POOLING_FLAGS.items()}
    if modes != [mode for mode in POOLING_FLAGS.values() if mode in modes]:
        config["pooling_mode"] = modes  # an order that the flags cannot express
    return config


def pair_activations(layers):
    """Return [(layer, the activation after it or None)] of a head's layers."""
    pairs = []
    for layer in layers:
        if isinstance(layer, (nn.Linear, nn.LayerNorm, Normalize)):
            pairs.append((layer, None))
        else:
            pairs[-1] = (pairs[-1][0], layer)
    return pairs


def save_head(folder, layer, activation=None):
    """Write a layer of the head as a sentence-transformers module, which open_head can open."""
    if isinstance(layer, Normalize):
        write_json(os.path.join(folder, "config.json"), {})
        return
    if isinstance(layer, nn.Linear):
        prefix = "linear."
        kind = type(activation or nn.Identity())
        config = {"in_features": layer.in_features, "out_features": layer.out_features,
                  "bias": layer.bias is not None,
                  "activation_function": f"{kind.__module__}.{kind.__name__}"}
    else:
        prefix = "norm."
        config = {"dimension": layer.normalized_shape[0]}
    os.makedirs(folder, exist_ok=True)
    save_weights(os.path.join(folder, "model.safetensors"),
                 {prefix + name: value for name, value in layer.state_dict().items()})
    write_json(os.path.join(folder, "config.json"), config)


def save_fid_retriever(folder, encoder):
    """Write the layout that open_fid_retriever and FiD's Retriever.from_pretrained open."""
    weights = {f"model.{name}": value for name, value in encoder.model.state_dict().items()}
    for layer, prefix in zip(encoder.head, ("proj", "norm")):
        weights |= {f"{prefix}.{name}": value for name, value in layer.state_dict().items()}
    config = encoder.model.config.to_dict() | {"architectures": ["Retriever"],
                                               "projection": len(encoder.head) > 0}
    os.makedirs(folder, exist_ok=True)
    save_weights(os.path.join(folder, "model.safetensors"), weights)
    write_json(os.path.join(folder, "config.json"), config)


def save_weights(path, weights):
    """Write {name: tensor} as safetensors, which takes contiguous tensors only."""
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
