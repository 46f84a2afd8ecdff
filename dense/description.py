"""Read from the files of a retriever's folder how a text becomes a vector, into a Description.

    layout                     recognised by
    sentence-transformers'     modules.json; the transformer may lie in a folder of its own
    FiD's distilled retriever  indexing_dimension in config.json
    DPR's, as on the hub       model_type dpr in config.json
    transformers'              none of the above; sentence-transformers' defaults apply
    minDPR's and DPR's files   a file instead of a folder

A folder that sentence-transformers opens gives the same vectors here as its encode_query and
encode_document, or it is refused with an InputError that names the setting.
"""
import functools
import os
from dataclasses import dataclass, field

from records.reading import read_args, read_settings
from training.checkpoints import find_model, read_config, refuse_adapters
from utils import InputError, refusing, shorten

# {our name: sentence-transformers' name}; several are joined by "+", and their vectors concatenated
POOLING = {"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len": "mean_sqrt_len_tokens",
           "weighted_mean": "weightedmean", "last": "lasttoken"}
SIMILARITY = {"ip": "dot", "cos": "cosine", "l2": "euclidean"}
# the flags of older Pooling configurations, in the order in which vectors are concatenated
POOLING_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
                 "pooling_mode_mean_tokens": "mean",
                 "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
                 "pooling_mode_weightedmean_tokens": "weightedmean",
                 "pooling_mode_lasttoken": "lasttoken"}
# modules after the pooling; Dropout does not change a trained model's vectors
HEADS = ("Dense", "LayerNorm", "Normalize", "Dropout")
# settings of the transformer's module that change its vectors and are not supported here
TRANSFORMER_SETTINGS = ("query_expansion", "tokenizer_name_or_path", "config_args", "config_kwargs")
TRANSFORMER_FILES = [f"sentence_{name}_config.json" for name in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")]
# arguments of the transformer's module that do not change float32 vectors
HARMLESS = ("torch_dtype", "dtype", "attn_implementation", "add_pooling_layer", "padding_side",
            "low_cpu_mem_usage", "use_fast", "trust_remote_code", "device_map", "use_safetensors",
            "unpad_inputs", "model_max_length")


@dataclass
class Description:
    """Hold how texts become vectors, as a folder's files set it.

    folder        the folder of the transformer and its tokenizer
    pooling       names of POOLING, joined by "+"
    heads         [(kind, folder)] of the modules after the pooling, in their order
    skips_prompt  leave the prompt's tokens out of the pooling (include_prompt false)
    metric        ip, cos or l2
    truncate_dim  how many numbers of a vector to keep; None: all
    prompts       {query, key: text} put before every text
    default_name  name of the prompt that encode puts before texts; encode_query and
                  encode_document do not use it
    document_names
                  names of prompts for documents that encode_document does not use
    lengths       {query, key: most tokens of a text} from files other than the tokenizer's
    lowercases    put texts into lower case before the tokenizer's own normalisation
    has_modules   the folder has modules.json, which sentence-transformers writes
    is_ours       train_dense.py wrote the folder
    sources       {name of a field: the file that sets it}, without fields that keep their default
    """
    folder: str
    pooling: str = "mean"
    heads: list = field(default_factory=list)
    skips_prompt: bool = False
    metric: str = "cos"
    truncate_dim: int | None = None
    prompts: dict = field(default_factory=dict)
    default_name: str | None = None
    document_names: list = field(default_factory=list)
    lengths: dict = field(default_factory=dict)
    lowercases: bool = False
    has_modules: bool = False
    is_ours: bool = False
    sources: dict = field(default_factory=dict)

    @property
    def normalises(self):
        """Return whether the folder's own modules normalise the vectors."""
        return any(kind == "Normalize" for kind, _ in self.heads)


# ---------------------------------------------------------------- where the encoders are

def read_descriptions(name, key_name=None):
    """Return {query, key: Description} of a folder, hub name, or minDPR's or DPR's file.

    key_name: a separate encoder for the keys. Raises InputError.
    """
    name = find_path(name)
    is_file = os.path.isfile(name)
    is_pair = holds_pair(name)
    if key_name and is_pair:
        raise InputError(f"--key_encoder {key_name}: {name} already has a key encoder; leave the "
                         "flag out")
    if is_file:
        query = key = Description(name, "cls", metric="ip")
    elif is_pair:
        query = read_description(os.path.join(name, "query"))
        key = read_description(os.path.join(name, "key"))
        query.is_ours = key.is_ours = "retriever" in read_args(name)
    else:
        query = key = read_description(name)
        if key_name:
            key = read_description(find_path(key_name))
    return {"query": query, "key": key}


def holds_pair(path):
    """Return whether a folder, or minDPR's or DPR's file, holds two encoders."""
    return os.path.isfile(path) or os.path.isdir(os.path.join(path, "query"))


def find_path(name):
    """Return the path of a folder or file, or the folder of a hub name, fetched once per process.

    Raises InputError.
    """
    name = str(name)
    return name if os.path.exists(name) else fetch_model(name)


@functools.cache
def fetch_model(name):
    """Return the folder of a hub name."""
    return find_model(name)[0]


def read_description(folder):
    """Return the Description of a folder with one encoder. Raises InputError."""
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        refuse_adapters(folder)  # transformers would load them even next to a whole model
    with refusing(f"{folder}: cannot be opened as an encoder", "give the folder of a retriever or "
                  "an encoder, or fetch it again"):
        if os.path.exists(os.path.join(folder, "modules.json")):
            return read_modules(folder)
        return read_plain(folder)


def read_plain(folder):
    """Return the Description of a folder without modules.json.

    sentence-transformers' default pooling is the mean, or the last token of a causal language
    model.
    """
    config = read_config(folder, "encoder").to_dict()
    path = os.path.join(folder, "config.json")
    if "indexing_dimension" in config:
        lengths = {"query": config["question_maxlength"], "key": config["passage_maxlength"]}
        pooling = "cls" if config["extract_cls"] else "mean"
        return Description(folder, pooling, metric="ip", lengths=lengths,
                           sources=dict.fromkeys(("pooling", "metric", "lengths"), path))
    if config.get("model_type") == "dpr":
        return Description(folder, "cls", metric="ip",
                           sources=dict.fromkeys(("pooling", "metric"), path))
    architecture = first_architecture(config.get("architectures"))
    is_causal = architecture.endswith("ForCausalLM") and config.get("is_causal", True)
    return Description(folder, "last" if is_causal else "mean")


def first_architecture(names):
    """Return the first of a config.json's `architectures`, "" if it names none."""
    is_named = isinstance(names, list) and names and isinstance(names[0], str)
    return names[0] if is_named else ""


# ---------------------------------------------------------------- sentence-transformers' files

def read_modules(folder):
    """Return the Description of a folder with modules.json. Raises InputError."""
    path = os.path.join(folder, "modules.json")
    modules = []
    with refusing(f"{path}: is not a list of modules", "fetch it again"):
        for module in read_settings(path, list):
            modules.append((module["type"], str(module["path"])))
    kinds = [name.split(".")[-1] for name, _ in modules]
    for (name, module_path), kind in zip(modules, kinds):
        is_known = name.startswith("sentence_transformers.") and kind in ("Transformer", "Pooling",
                                                                          *HEADS)
        if not is_known or os.path.isabs(module_path) or ".." in module_path.split("/"):
            raise InputError(f"{path}: has a {shorten(kind)} module ({shorten(name)}), which is "
                             "not supported; use a retriever of Transformer, Pooling, Dense, "
                             "LayerNorm, Normalize and Dropout")
    if kinds[:2] != ["Transformer", "Pooling"] or "Transformer" in kinds[1:] \
            or "Pooling" in kinds[2:]:
        raise InputError(f"{path}: lists {', '.join(kinds)}; use a retriever of one Transformer, "
                         "one Pooling after it, and any of Dense, LayerNorm, Normalize, Dropout")
    folders = [os.path.join(folder, module_path) for _, module_path in modules]
    description = Description(folders[0].rstrip("/"), has_modules=True)
    description.heads = [head for head in zip(kinds[2:], folders[2:]) if head[0] != "Dropout"]
    for kind, head_folder in description.heads:
        check_head(kind, head_folder)
    read_pooling(description, os.path.join(folders[1], "config.json"))
    read_transformer(description)
    read_retriever(description, os.path.join(folder, "config_sentence_transformers.json"))
    description.is_ours = "retriever" in read_args(folder)
    return description


def check_head(kind, folder):
    """Raise InputError for a module that reads or writes anything except the text's vector."""
    path = os.path.join(folder, "config.json")
    config = read_settings(path)
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise InputError(f"{path}: {name} of a {kind} module must be sentence_embedding, got "
                             f"{shorten(config[name])}")


def read_pooling(description, path):
    """Set the Description's pooling from the Pooling module's configuration, of any version.

    Raises InputError.
    """
    config = read_settings(path)
    modes = config.get("pooling_mode")
    if modes is None:
        if not any(name.startswith("pooling_mode_") for name in config):
            raise InputError(f"{path}: has no pooling_mode; fetch it again")
        modes = [mode for name, mode in POOLING_FLAGS.items() if config.get(name)] or ["mean"]
        unknown = [name for name, value in config.items() if value is True
                   and name.startswith("pooling_mode_") and name not in POOLING_FLAGS]
        modes += unknown
    modes = [modes] if isinstance(modes, str) else modes
    names = {mode: name for name, mode in POOLING.items()}
    if not isinstance(modes, list) or not modes or any(mode not in names for mode in modes):
        raise InputError(f"{path}: pooling {shorten(modes)} is not supported; use a retriever "
                         f"with any of {list(POOLING.values())}")
    description.pooling = "+".join(names[mode] for mode in modes)
    description.skips_prompt = not config.get("include_prompt", True)
    description.sources["pooling"] = path


def read_transformer(description, task="feature-extraction"):
    """Set the Description's lengths and lower case from the transformer module's configuration.

    task: what the module must be for. Raises InputError.
    """
    for name in TRANSFORMER_FILES:
        path = os.path.join(description.folder, name)
        config = read_settings(path)
        if config:
            break
    else:
        return
    check_transformer(config, path, task)
    description.lowercases = bool(config.get("do_lower_case", False))
    processing = config.get("processing_kwargs") or {}
    tokenizer_args = config.get("tokenizer_args") or config.get("processor_kwargs") or {}
    shared = first_given(processing.get("text", {}).get("max_length"),
                         tokenizer_args.get("model_max_length"), config.get("max_seq_length"))
    own = {"query": config.get("query_length"), "key": config.get("document_length")}
    if processing.get("text", {}).get("max_length"):
        own = {}
    for role in ("query", "key"):
        length = first_given(own.get(role), shared)
        if length is None:
            continue
        if type(length) is not int or length < 2:  # a text has two special tokens
            raise InputError(f"{path}: the length of a text must be >= 2 tokens, got "
                             f"{shorten(length)}; fetch it again")
        description.lengths[role] = length
        description.sources["lengths"] = path


def first_given(*values):
    """Return the first of the values that is not None, or None."""
    return next((value for value in values if value is not None), None)


def check_transformer(config, path, task):
    """Raise InputError for settings of the transformer's module that would change its vectors or
    scores.
    """
    unsupported = [name for name in TRANSFORMER_SETTINGS if config.get(name)]
    if config.get("transformer_task", task) != task:
        unsupported.append("transformer_task")
    for name in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs"):
        unsupported += [key for key in config.get(name) or {} if key not in HARMLESS]
    processing = config.get("processing_kwargs") or {}
    for kind, values in processing.items():
        unsupported += [f"processing_kwargs {kind}" for key in values
                        if (kind, key) != ("text", "max_length") and values]
    output, name = {"feature-extraction": ("last_hidden_state", "token_embeddings"),
                    "sequence-classification": ("logits", "scores")}[task]
    texts = {"method": "forward", "method_output_name": output}
    modalities = config.get("modality_config") or {"text": texts}
    if "message" in modalities or modalities.get("text") != texts:
        unsupported.append("modality_config")
    if config.get("module_output_name", name) != name:
        unsupported.append("module_output_name")
    if unsupported:
        raise InputError(f"{path}: its {unsupported[0]} is not supported; use a retriever without "
                         "this setting")


def read_retriever(description, path):
    """Set the Description's metric, dimensions and prompts from config_sentence_transformers.json.

    Raises InputError.
    """
    settings = read_settings(path)
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise InputError(f"{path}: is the configuration of a {shorten(kind)}; use a retriever with "
                         "one vector per text")
    similarity = settings.get("similarity_fn_name")
    if similarity is not None:
        metrics = [metric for metric, name in SIMILARITY.items() if name == similarity]
        if not metrics:
            raise InputError(f"{path}: similarity_fn_name must be one of "
                             f"{', '.join(SIMILARITY.values())}, got {shorten(similarity)}")
        description.metric = metrics[0]
        description.sources["metric"] = path
    truncate_dim = settings.get("truncate_dim")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise InputError(f"{path}: truncate_dim must be >= 1, got {shorten(truncate_dim)}; fetch "
                         "it again")
    description.truncate_dim = truncate_dim
    prompts = settings.get("prompts") or {}
    are_texts = isinstance(prompts, dict) and all(
        text is None or isinstance(text, str) for text in prompts.values())
    if not are_texts:
        raise InputError(f"{path}: prompts must be an object of texts, got {shorten(prompts)}; "
                         "fetch it again")
    default_name = settings.get("default_prompt_name")
    if default_name is not None and default_name not in {"query", "document", *prompts}:
        raise InputError(f"{path}: default_prompt_name {shorten(default_name)} is not among its "
                         "prompts; fetch it again")
    # encode_document uses the prompt "document" and no other
    for role, prompt_name in (("query", "query"), ("key", "document")):
        if prompts.get(prompt_name) is not None:
            description.prompts[role] = prompts[prompt_name]
            description.sources["prompts"] = path
    description.document_names = [name for name in ("passage", "corpus") if prompts.get(name)]
    if default_name is not None and prompts.get(default_name):
        description.default_name = default_name
