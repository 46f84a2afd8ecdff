"""The layouts that retrievers and rankers are opened from, and the folders they are saved to.

    layout                            opened by            recognised by
    ours, sentence-transformers'      open_encoder         modules.json
    ours with two encoders            open_encoders        folder/query and folder/key
    transformers'                     open_encoder         no modules.json: no head, cls pooling
    FiD's distilled retriever         open_fid_retriever   indexing_dimension in config.json
    minDPR's file, DPR's file         open_dpr_file        a file instead of a folder
    a ranker, ours or transformers'   open_ranker          the flag --ranker

A saved retriever opens with sentence_transformers.SentenceTransformer(folder) and AutoModel, one of
two encoders with folder/query and folder/key; FiD's retriever, which they cannot express, is saved
in its own layout. A saved ranker opens with sentence_transformers.CrossEncoder(folder).
"""
import os

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, T5EncoderModel

from checkpoints import (
    announce_random_start,
    check_shapes,
    find_model,
    find_weights,
    read_config,
    read_weights,
)
from dense.text_encoder import TextEncoder
from files import read_args, read_settings, to_number, write_json
from utils import InputError, refusing, shorten

# our names to sentence-transformers'
POOLING = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
SIMILARITY = {"ip": "dot", "cos": "cosine", "l2": "euclidean"}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate",
            "attention_dropout")
# minDPR's and DPR's prefixes of the names of weights
QUERY_PREFIXES = ("query_encoder.encoder.", "question_model.")
KEY_PREFIXES = ("passage_encoder.encoder.", "ctx_model.")


# ---------------------------------------------------------------- opening

def open_encoders(name, key_name=None, pooling=None, dropout=None, trained=False):
    """(query encoder, key encoder or None if one serves both, what the checkpoint states of metric,
    temperature, separator).

    For the arguments see BiEncoder.open. Raises InputError.
    """
    if not os.path.isfile(name):
        name = find_model(name)[0]
    is_pair = os.path.isdir(os.path.join(name, "query"))
    if key_name and (os.path.isfile(name) or is_pair):
        raise InputError(f"--key_encoder {key_name}: {name} has an encoder of the keys already; "
                         "leave the flag out")
    if os.path.isfile(name):
        query_encoder, key_encoder = open_dpr_file(name, dropout)
        stated = {"metric": "ip"}
    elif is_pair:
        query_encoder, stated = open_encoder(os.path.join(name, "query"), pooling, dropout, trained)
        key_encoder, _ = open_encoder(os.path.join(name, "key"), pooling, dropout, trained)
    else:
        query_encoder, stated = open_encoder(name, pooling, dropout, trained)
        key_encoder = None
        if key_name:
            key_encoder, _ = open_encoder(find_model(key_name)[0], pooling, dropout, trained)
    return query_encoder, key_encoder, stated | read_stated(name)


def read_stated(name):
    """{metric, temperature, separator} as far as a retriever's args.json states them.

    Raises InputError for values that cannot be, and for a reader's args.json.
    """
    args = read_args(name)
    if "dev_em" in args:
        raise InputError(f"{name}: is a reader, which train_epoch.py has written; give the folder "
                         "of a retriever or an encoder")
    stated = args.get("retriever", {})
    path = os.path.join(name, "args.json")
    with refusing(f"{path}: its 'retriever' is not metric, temperature and separator", "mend it"):
        if stated.get("metric", "cos") not in SIMILARITY:
            raise ValueError(f"metric {shorten(stated['metric'])}")
        if to_number(stated.get("temperature", 1)) <= 0:
            raise ValueError(f"temperature {shorten(stated['temperature'])}")
        if type(stated.get("separator")) not in (int, type(None)):
            raise ValueError(f"separator {shorten(stated['separator'])}")
    return stated


def open_encoder(folder, pooling=None, dropout=None, trained=False):
    """(TextEncoder of a folder with one encoder, {metric, temperature} as far as the folder states
    them).
    """
    config = read_config(folder, "encoder").to_dict()
    with refusing(f"{folder}: cannot be opened as an encoder", "give the folder of a retriever or "
                  "an encoder, or fetch it again"):
        if "indexing_dimension" in config:
            return open_fid_retriever(folder, config, dropout)
        model = open_transformer(folder, dropout, trained)
        stated_pooling, layers, stated = read_modules(folder)
        head = nn.Sequential(*layers)
        head(torch.zeros(1, model.config.hidden_size))  # its layers may be of other sizes
        return TextEncoder(model, pooling or stated_pooling, head), stated


def read_modules(folder):
    """(pooling, head, {metric} if stated) of sentence-transformers' files, where there are any."""
    stated_pooling, head, stated = "cls", [], {}
    modules_path = os.path.join(folder, "modules.json")
    for module in read_settings(modules_path, list):
        kind = module["type"].split(".")[-1]
        module_folder = os.path.join(folder, module["path"])
        if kind == "Pooling":
            stated_pooling = read_pooling(os.path.join(module_folder, "config.json"))
        elif kind == "Normalize":
            stated["metric"] = "cos"
        elif kind in ("Dense", "LayerNorm"):
            head.append(open_head(kind, module_folder))
        elif kind != "Transformer":
            raise InputError(f"{modules_path}: has a {shorten(kind)} module, which is not "
                             "supported; use a retriever of Transformer, Pooling, Dense, LayerNorm "
                             "and Normalize")
    settings = read_settings(os.path.join(folder, "config_sentence_transformers.json"))
    for metric, similarity in SIMILARITY.items():
        if settings.get("similarity_fn_name") == similarity:
            stated["metric"] = metric
    return stated_pooling, head, stated


def open_transformer(folder, dropout=None, trained=False):
    """The transformer of a folder in float32.

    One without weights starts from random ones, which is printed, or is refused if it must be
    `trained`.
    """
    config = read_config(folder, "encoder")
    set_dropout(config, dropout)
    kind = T5EncoderModel if config.model_type in ("t5", "mt5") else AutoModel
    if not find_weights(folder, required=trained):
        announce_random_start(folder)
        return AutoModel.from_config(config) if kind is AutoModel else T5EncoderModel(config)
    return kind.from_pretrained(folder, config=config, dtype=torch.float32)


def set_dropout(config, dropout):
    """Sets every dropout rate that the configuration has; None leaves them as they are."""
    for name in DROPOUTS:
        if dropout is not None and hasattr(config, name):
            setattr(config, name, dropout)


def read_pooling(path):
    """Our name of the pooling that a sentence-transformers configuration, of any of its versions,
    states.

    Raises InputError.
    """
    config = read_settings(path)
    modes = config.get("pooling_mode")
    if isinstance(modes, str):
        modes = [modes]
    if not modes:  # older: pooling_mode_cls_token, pooling_mode_mean_tokens, ..., one of them true
        names = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
                 for name in names]
    for pooling, mode in POOLING.items():
        if modes == [mode]:
            return pooling
    raise InputError(f"{path}: pooling {shorten(modes)} is not supported; one of "
                     f"{list(POOLING.values())} is")


def open_head(kind, folder):
    """A Dense or LayerNorm module of sentence-transformers as a torch layer. Raises InputError."""
    weights = {name.split(".")[-1]: value for name, value in (read_weights(folder) or {}).items()}
    config = read_settings(os.path.join(folder, "config.json"))
    is_linear = str(config.get("activation_function")).endswith("Identity")
    if "weight" not in weights or kind == "Dense" and not is_linear:
        raise InputError(f"{folder}: a {kind} module without weights or with another activation "
                         "than Identity is not supported")
    shape = weights["weight"].shape
    if kind == "LayerNorm":
        layer = nn.LayerNorm(shape)
    else:
        layer = nn.Linear(shape[1], shape[0], bias="bias" in weights)
    layer.load_state_dict(weights)
    return layer


def open_dpr_file(path, dropout=None):
    """(query encoder, key encoder) of minDPR's file ('query_encoder.encoder.'...) or DPR's
    ('question_model.'...).
    """
    folder, weights = find_model(path)
    with refusing(f"{path}: cannot be opened as minDPR's or DPR's file", "fetch it again"):
        query_encoder = build_dpr_encoder(folder, weights, QUERY_PREFIXES, path, dropout)
        key_encoder = build_dpr_encoder(folder, weights, KEY_PREFIXES, path, dropout)
        return query_encoder, key_encoder


def build_dpr_encoder(folder, weights, prefixes, path, dropout):
    """The TextEncoder of the weights whose names begin with one of the prefixes; DPR's may have a
    projection behind it.
    """
    bert_weights, projection = {}, {}
    for prefix in prefixes:
        for name, value in weights.items():
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            if name.startswith("encode_proj."):
                projection[name.removeprefix("encode_proj.")] = value
            else:
                bert_weights[name] = value
    if not bert_weights:
        raise InputError(f"{path}: has no weights named {prefixes[0]}... or {prefixes[1]}...; is "
                         "it a bi-encoder of minDPR or DPR?")
    encoder = TextEncoder(build_bert(folder, bert_weights, path, dropout))
    if projection:
        out_features, in_features = projection["weight"].shape
        layer = nn.Linear(in_features, out_features)
        layer.load_state_dict(projection)
        encoder.head.append(layer)
    return encoder


def build_bert(folder, weights, source, dropout=None):
    """A transformer of the folder's configuration with these weights.

    Raises InputError, naming `source`, if they do not fit.
    """
    config = read_config(folder, "encoder")
    set_dropout(config, dropout)
    model = AutoModel.from_config(config)
    if not any(name.startswith("pooler.") for name in weights):
        model.pooler = None
    weights = {name: value.float() for name, value in weights.items()
               if not name.endswith("position_ids")}  # a constant that old checkpoints carry
    check_shapes(model, weights, source)
    model.load_state_dict(weights)
    return model


def open_fid_retriever(folder, config, dropout=None):
    """FiD's distilled retriever (arXiv 2012.04584): BERT, projection and norm of each token, then
    the mean over all positions or over the real ones.

    Its score is dot / sqrt(d). Raises InputError for different masks of questions and passages:
    they share one encoder.
    """
    weights = read_weights(folder)
    if weights is None or config["apply_question_mask"] != config["apply_passage_mask"]:
        raise InputError(f"{folder}: an FiD retriever needs weights, and the same "
                         "apply_question_mask as apply_passage_mask")
    bert_weights = {name.removeprefix("model."): value for name, value in weights.items()
                    if name.startswith("model.")}
    bert = build_bert(folder, bert_weights, folder, dropout)
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
    return encoder, {"metric": "ip", "temperature": dimension ** 0.5}


def open_ranker(name, dropout=None, trained=False):
    """transformers' sequence classifier with one score; for the arguments see CrossEncoder.open.

    Raises InputError.
    """
    folder = find_model(name)[0]
    config = read_config(folder, "ranker or encoder")
    config.num_labels = 1
    set_dropout(config, dropout)
    has_weights = find_weights(folder, required=trained)
    with refusing(f"{folder}: cannot be opened as a ranker with one score", "give the folder of a "
                  "ranker or an encoder"):
        if not has_weights:
            return AutoModelForSequenceClassification.from_config(config)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True)
    if trained and loading["missing_keys"]:
        raise InputError(f"{folder}: is no ranker, it has no {min(loading['missing_keys'])}; train "
                         "one with train_dense.py --ranker")
    return model


# ---------------------------------------------------------------- saving

def save_encoder(folder, encoder, metric, max_length, prompts):
    """Writes one encoder as a sentence-transformers folder; FiD's retriever in FiD's own layout."""
    if encoder.head_first:
        save_fid_retriever(folder, encoder)
        return
    encoder.model.save_pretrained(folder)
    pooling = {"word_embedding_dimension": encoder.model.config.hidden_size,
               "pooling_mode_cls_token": encoder.pooling == "cls",
               "pooling_mode_mean_tokens": encoder.pooling == "mean",
               "pooling_mode_lasttoken": encoder.pooling == "last"}
    write_json(os.path.join(folder, "1_Pooling", "config.json"), pooling)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for layer in encoder.head:
        kind = "Dense" if isinstance(layer, nn.Linear) else "LayerNorm"
        path = f"{len(modules)}_{kind}"
        save_head(os.path.join(folder, path), layer)
        modules.append((kind, path))
    if metric == "cos":
        path = f"{len(modules)}_Normalize"
        write_json(os.path.join(folder, path, "config.json"), {})
        modules.append(("Normalize", path))

    listed = []
    for index, (kind, path) in enumerate(modules):
        listed.append({"idx": index, "name": str(index), "path": path,
                       "type": f"sentence_transformers.models.{kind}"})
    write_json(os.path.join(folder, "modules.json"), listed)
    write_json(os.path.join(folder, "sentence_bert_config.json"),
               {"max_seq_length": max_length, "do_lower_case": False})
    write_json(os.path.join(folder, "config_sentence_transformers.json"),
               {"similarity_fn_name": SIMILARITY[metric], "prompts": prompts})


def save_head(folder, layer):
    """Writes a linear or norm layer as the module of sentence-transformers that open_head opens."""
    if isinstance(layer, nn.Linear):
        prefix = "linear."
        config = {"in_features": layer.in_features, "out_features": layer.out_features,
                  "bias": layer.bias is not None,
                  "activation_function": "torch.nn.modules.linear.Identity"}
    else:
        prefix = "norm."
        config = {"dimension": layer.normalized_shape[0]}
    os.makedirs(folder, exist_ok=True)
    save_weights(os.path.join(folder, "model.safetensors"),
                 {prefix + name: value for name, value in layer.state_dict().items()})
    write_json(os.path.join(folder, "config.json"), config)


def save_fid_retriever(folder, encoder):
    """Writes the layout that open_fid_retriever and FiD's Retriever.from_pretrained open."""
    weights = {f"model.{name}": value for name, value in encoder.model.state_dict().items()}
    for layer, prefix in zip(encoder.head, ("proj", "norm")):
        weights |= {f"{prefix}.{name}": value for name, value in layer.state_dict().items()}
    config = encoder.model.config.to_dict() | {"architectures": ["Retriever"],
                                               "projection": len(encoder.head) > 0}
    os.makedirs(folder, exist_ok=True)
    save_weights(os.path.join(folder, "model.safetensors"), weights)
    write_json(os.path.join(folder, "config.json"), config)


def save_weights(path, weights):
    """Writes {name: tensor} as safetensors, which takes contiguous tensors only."""
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
