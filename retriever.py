"""Retrievers and rankers: BiEncoder (one vector per text), CrossEncoder (one score per pair), and the folders they live in.

A saved bi-encoder opens with sentence_transformers.SentenceTransformer(folder) and AutoModel; two separate encoders lie in
folder/query and folder/key, each such a folder. A saved ranker opens with sentence_transformers.CrossEncoder(folder).
"""
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, T5EncoderModel

from checkpoints import check_shapes, find_model, find_weights, read_config, read_weights
from encoders import TextEncoder, run_in_chunks
from utils import InputError, read_args, write_json

POOLING = {"cls": "cls", "mean": "mean", "last": "lasttoken"}  # our names to sentence-transformers'
SIMILARITY = {"ip": "dot", "cos": "cosine", "l2": "euclidean"}


class GatherRows(torch.autograd.Function):
    """The rows of all processes, in the order of their ranks; processes may have different numbers of rows.

    Every process computes the same loss of all rows, so the gradient of its own rows is complete without communication; it is
    multiplied by the number of processes because DistributedDataParallel averages.
    """

    @staticmethod
    def forward(ctx, rows):
        parts = gather_tensors(rows)
        ctx.start, ctx.end = sum(map(len, parts[:dist.get_rank()])), sum(map(len, parts[:dist.get_rank() + 1]))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.start:ctx.end] * dist.get_world_size()


def gather_tensors(rows):
    """[rows of each process], tensors (n_i, ...) whose n_i may differ."""
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    counts = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[:len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts)]


def gather_rows(rows):
    """GatherRows where there are several processes, else the rows themselves."""
    return GatherRows.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


class BiEncoder(nn.Module):
    """Query and key encoders and the metric that compares their vectors.

    metric: ip, cos (vectors of length 1) or l2 (minus the squared distance); scores are divided by the temperature.
    """

    def __init__(self, query_encoder, key_encoder=None, metric="cos", temperature=1.0):
        super().__init__()
        self.query_encoder, self.metric, self.temperature = query_encoder, metric, temperature
        if key_encoder is not None:
            self.key_encoder = key_encoder

    @property
    def encoders(self):
        """{role: encoder}; one encoder, for both roles, has the empty role."""
        return {"query": self.query_encoder, "key": self.key_encoder} if hasattr(self, "key_encoder") else {"": self.query_encoder}

    def encode(self, texts, role, chunk_size=0):
        """Vectors (n, D) of lists of token ids; role is query or key."""
        encoder = self.key_encoder if role == "key" and hasattr(self, "key_encoder") else self.query_encoder
        vectors = encoder(texts, role, chunk_size)
        return F.normalize(vectors, dim=-1) if self.metric == "cos" else vectors

    def forward(self, queries, keys, chunk_size=0):
        return self.encode(queries, "query", chunk_size), self.encode(keys, "key", chunk_size)

    def score(self, queries, keys):
        """Scores (Q, K) of vectors (Q, D) and (K, D), in float32 under autocast too: a temperature of 0.01 magnifies rounding."""
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries.float() @ keys.float().t()
            if self.metric == "l2":
                scores = 2 * scores - queries.square().sum(1, keepdim=True) - keys.square().sum(1)
            return scores / self.temperature

    def save_pretrained(self, folder, max_length, prompts=None):
        """Writes the folder; max_length and the prompts (query, document) are what sentence-transformers will use."""
        for role, encoder in self.encoders.items():
            save_encoder(os.path.join(folder, role), encoder, self.metric, max_length, prompts or {})

    @classmethod
    def open(cls, name, key_name=None, **settings):
        """A retriever from a folder or hub name (ours, sentence-transformers', transformers', FiD's), minDPR's or DPR's file.

        settings: metric, pooling, temperature (None: what the checkpoint says, else cos, cls, 1), dropout, and trained, which refuses
        a folder without weights; key_name opens a second encoder for the keys. Raises InputError.
        """
        name, wanted = str(name), {key: value for key, value in settings.items() if value is not None}
        if key_name and (os.path.isfile(name) or os.path.isdir(os.path.join(name, "query"))):
            raise InputError(f"--key_encoder {key_name}: {name} has an encoder of the keys already; leave the flag out")
        if os.path.isfile(name):
            query, key = open_dpr_file(name, wanted.get("dropout"))
            found = {"metric": "ip"}
        elif os.path.isdir(os.path.join(name, "query")):
            (query, found), (key, _) = (open_encoder(os.path.join(name, role), wanted) for role in ("query", "key"))
        else:
            query, found = open_encoder(find_model(name)[0], wanted)
            key = open_encoder(find_model(key_name)[0], wanted)[0] if key_name else None
        found |= read_args(name).get("retriever", {}) | {key: wanted[key] for key in ("metric", "temperature") if key in wanted}
        model = cls(query, key, found.get("metric", "cos"), found.get("temperature", 1.0))
        for encoder in model.encoders.values():
            encoder.separator = found.get("separator")
        return model


def limit_lengths(args, encoders, say):
    """Cuts --query_max_length and --key_max_length to what the encoders' (or the ranker's, for both texts) positions allow."""
    for config in [encoder.model.config for encoder in encoders]:
        most = getattr(config, "max_position_embeddings", None)
        if not most or most < 0:
            continue
        if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # their positions start after the padding's
            most -= config.pad_token_id + 1
        for name in ("query_max_length", "key_max_length"):
            allowed = most - (args.ranker and name == "key_max_length") * args.query_max_length
            if getattr(args, name) > allowed:
                say(f"note: the model has {most} positions; --{name} is {allowed}, not {getattr(args, name)}")
                setattr(args, name, allowed)


class CrossEncoder(nn.Module):
    """A ranker: a transformer with a one-number head reads query and key together."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pairs, chunk_size=0):
        """Scores (n) of (token ids, token types) of n pairs; see run_in_chunks for chunk_size."""
        device, pad = next(self.parameters()).device, self.model.config.pad_token_id

        def inputs(places):
            return [nn.utils.rnn.pad_sequence([torch.tensor(pairs[i][k]) for i in places], True, filling).to(device)
                    for k, filling in enumerate((pad, 0))]
        return run_in_chunks(self.score_chunk, inputs, [len(ids) for ids, _ in pairs], chunk_size, device)

    def score_chunk(self, ids, types, sizes):
        """Scores (n) of the padded ids and types (n, L) of pairs of these sizes."""
        mask = torch.arange(sizes[0], device=ids.device) < torch.tensor(sizes, device=ids.device)[:, None]
        more = {"token_type_ids": types} if getattr(self.model.config, "type_vocab_size", 1) > 1 else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **more).logits[:, 0].float()

    def save_pretrained(self, folder, *_):  # the same call as BiEncoder's
        self.model.save_pretrained(folder)

    @classmethod
    def open(cls, name, dropout=None, trained=False, **_):
        """A ranker from a folder or hub name; an encoder without a ranking head gets a random one. Raises InputError."""
        folder = find_model(name)[0]
        config = read_config(folder, "ranker or encoder")
        config.num_labels = 1
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        if not find_weights(folder, required=trained):
            return cls(AutoModelForSequenceClassification.from_config(config))
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32,
                                                                              output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{folder}: cannot be opened as a ranker with one score ({reason})") from None
        if trained and found["missing_keys"]:
            raise InputError(f"{folder}: is no ranker, it has no {min(found['missing_keys'])}; train one with train_dense.py --ranker")
        return cls(model)


# ---------------------------------------------------------------------------------------------------- opening and saving

def open_encoder(folder, wanted):
    """(TextEncoder, {metric, temperature as far as the folder says}) of one encoder's folder."""
    raw = read_config(folder, "encoder").to_dict()
    if "indexing_dimension" in raw:
        return open_fid_retriever(folder, raw, wanted.get("dropout"))
    model = open_transformer(folder, wanted.get("dropout"), wanted.get("trained", False))
    pooling, head, found = "cls", [], {}
    path = os.path.join(folder, "modules.json")
    for module in json.load(open(path)) if os.path.exists(path) else []:
        kind, place = module["type"].split(".")[-1], os.path.join(folder, module["path"])
        if kind == "Pooling":
            pooling = read_pooling(os.path.join(place, "config.json"))
        elif kind == "Normalize":
            found["metric"] = "cos"
        elif kind in ("Dense", "LayerNorm"):
            head.append(open_head(kind, place))
        elif kind != "Transformer":
            raise InputError(f"{path}: has a {kind} module, which is not supported; use a retriever of Transformer, Pooling, "
                             "Dense, LayerNorm and Normalize")
    path = os.path.join(folder, "config_sentence_transformers.json")
    name = json.load(open(path)).get("similarity_fn_name") if os.path.exists(path) else None
    found |= {"metric": key for key, value in SIMILARITY.items() if value == name}
    return TextEncoder(model, wanted.get("pooling") or pooling, nn.Sequential(*head)), found


def open_transformer(folder, dropout=None, trained=False):
    """The transformer of a folder in float32; one without weights starts at random and says so, or, if it must be trained, is refused."""
    config = read_config(folder, "encoder")
    if dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
    kind = T5EncoderModel if config.model_type in ("t5", "mt5") else AutoModel
    if not find_weights(folder, required=trained):
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder}: no weights there, starting from random initialisation", flush=True)
        return kind.from_config(config) if kind is AutoModel else kind(config)
    try:
        return kind.from_pretrained(folder, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: its weights cannot be opened ({str(error).strip().splitlines()[0]})") from None


def read_pooling(path):
    """Our name of a sentence-transformers pooling configuration, of any of its versions."""
    config = json.load(open(path))
    modes = config.get("pooling_mode") or [key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
                                           for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLING.values():
        raise InputError(f"{path}: pooling {modes} is not supported; one of {list(POOLING.values())} is")
    return next(name for name, value in POOLING.items() if value == modes[0])


def open_head(kind, folder):
    """A Dense or LayerNorm module of sentence-transformers as torch layers."""
    weights = {key.split(".", 1)[1]: value for key, value in (read_weights(folder) or {}).items()}
    config = json.load(open(os.path.join(folder, "config.json")))
    if "weight" not in weights or kind == "Dense" and not config.get("activation_function", "").endswith("Identity"):
        raise InputError(f"{folder}: a {kind} module without weights or with another activation than Identity is not supported")
    shape = weights["weight"].shape
    layer = nn.LayerNorm(shape) if kind == "LayerNorm" else nn.Linear(shape[1], shape[0], bias="bias" in weights)
    layer.load_state_dict(weights)
    return layer


def build_bert(folder, weights, source, dropout=None):
    """A transformer of folder's configuration with these weights; the position_ids of old checkpoints are ignored."""
    config = read_config(folder, "encoder")
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model = AutoModel.from_config(config)
    if not any(key.startswith("pooler.") for key in weights):
        model.pooler = None
    weights = {key: value.float() for key, value in weights.items() if not key.endswith("position_ids")}
    check_shapes(model, weights, source)
    model.load_state_dict(weights)
    return model


def open_dpr_file(path, dropout=None):
    """(query encoder, key encoder) of minDPR's file ('query_encoder.encoder.'...) or DPR's ('question_model.'...)."""
    folder, weights = find_model(path)
    encoders = []
    for names in (("query_encoder.encoder.", "question_model."), ("passage_encoder.encoder.", "ctx_model.")):
        own = {key[len(name):]: value for name in names for key, value in weights.items() if key.startswith(name)}
        head = {key.removeprefix("encode_proj."): own.pop(key) for key in list(own) if key.startswith("encode_proj.")}
        if not own:
            raise InputError(f"{path}: has no weights named {names[0]}... or {names[1]}...; is it a bi-encoder of minDPR or DPR?")
        encoder = TextEncoder(build_bert(folder, own, path, dropout))
        if head:  # DPR's projection
            encoder.head.append(nn.Linear(*reversed(head["weight"].shape)))
            encoder.head[0].load_state_dict(head)
        encoders.append(encoder)
    return encoders


def open_fid_retriever(folder, config, dropout=None):
    """FiD's distilled retriever (arXiv 2012.04584): BERT, projection and norm of each token, mean over all places or the real ones.

    One score is dot / sqrt(d). Both flags must agree here: the texts share one encoder.
    """
    weights = read_weights(folder)
    if weights is None or config["apply_question_mask"] != config["apply_passage_mask"]:
        raise InputError(f"{folder}: an FiD retriever needs weights, and the same apply_question_mask as apply_passage_mask")
    own = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    encoder = TextEncoder(build_bert(folder, own, folder, dropout), "cls" if config["extract_cls"] else "mean")
    encoder.head_first = True
    if config["projection"]:
        encoder.head = nn.Sequential(nn.Linear(config["hidden_size"], config["indexing_dimension"]),
                                     nn.LayerNorm(config["indexing_dimension"]))
        encoder.head.load_state_dict({f"{i}.{kind}": weights[f"{name}.{kind}"] for i, name in enumerate(("proj", "norm"))
                                      for kind in ("weight", "bias")})
    if not config["apply_passage_mask"]:
        encoder.pad_to = {"query": config["question_maxlength"], "key": config["passage_maxlength"]}
    return encoder, {"metric": "ip", "temperature": config["indexing_dimension"] ** 0.5}


def save_encoder(folder, encoder, metric, max_length, prompts):
    """One encoder as a sentence-transformers folder; FiD's retriever, which they cannot express, in FiD's own form."""
    if encoder.head_first:
        return save_fid_retriever(folder, encoder)
    encoder.model.save_pretrained(folder)
    modules = [("Transformer", "", {}), ("Pooling", "1_Pooling", {
        "word_embedding_dimension": encoder.model.config.hidden_size, "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean", "pooling_mode_lasttoken": encoder.pooling == "last"})]
    for layer in encoder.head:
        place = f"{len(modules)}_{'Dense' if isinstance(layer, nn.Linear) else 'LayerNorm'}"
        if isinstance(layer, nn.Linear):
            config = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None,
                      "activation_function": "torch.nn.modules.linear.Identity"}
        else:
            config = {"dimension": layer.normalized_shape[0]}
        modules.append((place[2:], place, config))
        os.makedirs(os.path.join(folder, place))
        name = "linear." if isinstance(layer, nn.Linear) else "norm."
        save_file({name + key: value.contiguous() for key, value in layer.state_dict().items()},
                  os.path.join(folder, place, "model.safetensors"))
    if metric == "cos":
        modules.append(("Normalize", f"{len(modules)}_Normalize", {}))
    for _, place, config in modules[1:]:
        write_json(os.path.join(folder, place, "config.json"), config)
    listed = [{"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
              for i, (kind, place, _) in enumerate(modules)]
    write_json(os.path.join(folder, "modules.json"), listed)
    write_json(os.path.join(folder, "sentence_bert_config.json"), {"max_seq_length": max_length, "do_lower_case": False})
    write_json(os.path.join(folder, "config_sentence_transformers.json"),
               {"similarity_fn_name": SIMILARITY[metric], "prompts": prompts})


def save_fid_retriever(folder, encoder):
    """The form that open_fid_retriever and FiD's Retriever.from_pretrained open."""
    names = {"0": "proj", "1": "norm"}
    weights = {"model." + key: value for key, value in encoder.model.state_dict().items()}
    weights |= {f"{names[key[0]]}{key[1:]}": value for key, value in encoder.head.state_dict().items()}
    config = encoder.model.config.to_dict() | {"architectures": ["Retriever"], "projection": len(encoder.head) > 0}
    os.makedirs(folder, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, os.path.join(folder, "model.safetensors"))
    write_json(os.path.join(folder, "config.json"), config)
