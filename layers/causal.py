"""Causal language models over many texts side by side: no padding, and what texts begin with alike
is computed once.

The tokens of all texts are the one row (1, S) of a forward pass, so that linear layers, norms and
the embedding waste nothing. Texts that share a beginning share its rows:

    texts               segments             rows of the packed input
    k n o w  a b        k n o w              a b c d e k n o w
    k n o w  c d e          a b
                            c d e

A token attends to the tokens before it in its segment and to the segments that its own follows on,
and takes its position from the whole text. Only attention and the positions know of it; the model
stays transformers' own.
"""
import inspect
import os
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, GenerationConfig

from layers.packed_attention import GROUP_TOKENS, attention, split_by_length
from training.adapters import merge_saved_adapters
from training.checkpoints import (
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

PACKED = "packed_causal"  # the name of packed_causal_attention among transformers' attentions
# tokens of a forward pass: enough to keep the device busy, few enough for the answers' logits
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
# what layers may be called in config.json; others, such as "linear_attention", carry a state along
LAYER_TYPES = {"full_attention", "sliding_attention"}
# buffers that older versions of transformers saved
CONSTANTS = [r"rotary_emb\.inv_freq$", r"attn\.masked_bias$", r"(^|\.)position_ids$"]
# what files call a part of the model otherwise: GPT-NeoX's output layer
OTHER_NAMES = [(r"^embed_out\.", "lm_head.")]
PROBE = [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11]], [[5, 6, 7, 12, 13]]]  # token ids


class Text(NamedTuple):
    """A prompt and the answer whose likelihood is asked for, as token ids."""
    prompt: list
    answer: list


# ---------------------------------------------------------------- opening

def is_causal(config):
    """True for the configuration of a causal language model: encoders and models of encoder and
    decoder, some of which transformers can run as one, are none.
    """
    masked = transformers.MODEL_FOR_MASKED_LM_MAPPING
    return (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in masked
            and not config.is_encoder_decoder)


def open_lm(path_or_name, dropout=None, dtype=torch.float32, trained=False):
    """Return the causal language model of a folder or hub name.

    `dropout` replaces the configuration's rates. With the dtype None the weights stay in the file,
    as they are, until they are used. LoRA adapters of a folder of peft are merged into the model
    that they belong to. A folder without weights gives random ones, and a line is printed, or is
    refused if it must be `trained`. Raise InputError where nothing fits: unknown name, unreadable
    file, other architecture, other shapes, quantised weights.
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
    if kind.config_class is not type(config):  # of a model that reads images too, the text part
        config = config.get_text_config()
    if not find_weights(folder):
        refuse_gguf(folder)
    find_weights(folder, required=trained)
    weights = read_weights(folder)
    if dropout is not None:
        set_dropout(config, dropout)
    with refusing(f"{path_or_name}: no causal language model can be built of its config.json and "
                  "weights", "give the folder of a trained model"):
        if weights is None:
            announce_random_start(path_or_name)
            model = kind(config).to(dtype)
        else:
            model = build_lm(kind, config, weights, path_or_name, dtype)
    freeze_other_parts(model)
    read_generation_config(folder, model)
    return model


def set_dropout(config, rate):
    """Set all dropout rates of a configuration, whatever the family calls them."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if name.endswith(("dropout", "pdrop")) and type(value) in (int, float):
                setattr(part, name, rate)


def build_lm(kind, config, weights, source, dtype):
    """Return the model of this class, configuration and weights.

    transformers converts weights that it keeps in another form, such as those of experts. Raise
    InputError, which names `source`, where names or shapes differ.
    """
    with torch.device("meta"):  # shapes alone: a wrong configuration may ask for any amount
        skeleton = kind(config)
    weights = plain_names(drop_wrapper(weights, skeleton.state_dict(), source), skeleton)
    if count_numbers(skeleton.state_dict()) > 2 * count_numbers(weights):
        check_shapes(skeleton, weights, source)  # it names what does not fit
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # check_fit reports what does not fit
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


def count_numbers(weights):
    """Return how many numbers {name: weight} holds."""
    return sum(weight.numel() for weight in weights.values())


def freeze_other_parts(model):
    """Freeze what no text passes through, such as the part that reads images."""
    if model.config is model.config.get_text_config():
        return
    used = {id(weight) for part in (model.get_decoder(), model.get_output_embeddings())
            for weight in part.parameters()}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in used)


def read_generation_config(folder, model):
    """Give the model the settings of generation_config.json, if there is one; its end tokens end
    answers too. Raise InputError for ids that the vocabulary does not have.
    """
    path = os.path.join(folder, "generation_config.json")
    if not os.path.exists(path):
        return
    with refusing(f"{path}: cannot be read", "delete it, or fetch it again"):
        settings = GenerationConfig.from_pretrained(folder)
        try:
            settings.validate(strict=True)
        except ValueError:  # transformers would not save it again
            settings = GenerationConfig(bos_token_id=settings.bos_token_id,
                                        eos_token_id=settings.eos_token_id,
                                        pad_token_id=settings.pad_token_id)
    ends, size = list_ids(settings.eos_token_id), model.get_input_embeddings().num_embeddings
    if not all(type(end) is int and 0 <= end < size for end in ends):
        raise InputError(f"{path}: eos_token_id {shorten(settings.eos_token_id)} must be ids below "
                         f"{size}, the size of the vocabulary; correct it")
    model.generation_config = settings


def list_ids(value):
    """Return a token id, or a list of them, or None as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def plain_names(weights, skeleton):
    """The weights by the names that the model has: files have other names, leave out the prefix
    (GPT-2's), hold constant buffers, or leave out an output layer that is the embedding's.
    """
    expected, prefix = skeleton.state_dict().keys(), f"{skeleton.base_model_prefix}."
    constant = "|".join([*(skeleton._keys_to_ignore_on_load_unexpected or []), *CONSTANTS])
    named = {}
    for name, value in weights.items():
        if name not in expected:
            for pattern, own in OTHER_NAMES:
                name = re.sub(pattern, own, name)
        name = prefix + name if name not in expected and prefix + name in expected else name
        if name in expected or not re.search(constant, name):
            named[name] = value
    for name, source in (skeleton.all_tied_weights_keys or {}).items():
        if name not in named and source in named:
            named[name] = named[source]
    return named


def open_causal_lm(path_or_name, device, dtype=torch.float32, longest=None):
    """Return (the model in evaluation mode, why it cannot take packed texts or None).

    longest: tokens of the longest text that it will be given, None where that is not known. Raise
    InputError as open_lm, for a folder without weights, and for a model whose padded texts have
    other logits.
    """
    model = open_lm(path_or_name, dtype=dtype, trained=True)
    model.to(device).eval()
    with refusing(f"{path_or_name}: its model cannot be run", "give the folder of a trained model"):
        reason = why_not_packed(model, longest)
    if reason and not depends_on_longest(model.config):
        check_padded(model, path_or_name)
    return model, reason


def probe_ids(config):
    """Return the ids of a short text that models are tried with, the same for all."""
    size = config.get_text_config().vocab_size
    return [(3 + 5 * place) % size for place in range(8)]


def differs(logits, expected):
    """Return True if logits are not those expected, but for rounding.

    Weights that give no numbers are not judged here: scoring and training name them.
    """
    if not expected.isfinite().all():
        return False
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    return not (logits - expected).abs().max() <= tolerance * expected.abs().max()


@torch.inference_mode()
def check_padded(model, source):
    """Raise InputError if a text has other logits when it is padded on the right."""
    ids = probe_ids(model.config)
    problem = "a padded text has other logits than the text alone"
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


def why_not_packed(model, longest=None):
    """Why a model cannot take packed texts of at most `longest` tokens, or None if it can; its
    attention is then set to do so.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if layer_types - LAYER_TYPES or getattr(config, "attention_chunk_size", None):
        return "layers that are not causal attention to the whole text"
    window = getattr(config, "sliding_window", None)
    if window and (longest is None or longest > window):
        return f"attention to {window} tokens only"
    if depends_on_longest(config):
        return "positions that depend on the longest text, which is given alone"
    own_attention = config._attn_implementation
    if not agrees_when_packed(model):
        model.set_attn_implementation(own_attention)
        return "an attention of its own"
    return None


def depends_on_longest(config):
    """True if the longest text of a batch changes the positions of all."""
    return "longrope" in str(getattr(config.get_text_config(), "rope_parameters", None))


@torch.inference_mode()
def agrees_when_packed(model):
    """Return True if the PROBE's logits are the same packed as text by text, which sets the
    attention.

    Models that do more than causal attention differ, such as those with ALiBi or a state.
    """
    texts = list_texts(PROBE)
    expected = torch.stack([
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        for ids in texts])
    try:
        model.set_attn_implementation(PACKED)
        packed = pack_texts(PROBE, model.device)
        logits = packed_logits(model, packed, [rows[-1] for rows in packed.rows])
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError):
        return False  # it takes no other attention, or hands it no groups
    if logits.shape != expected.shape:  # it gives those of all places
        return False
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


# ---------------------------------------------------------------- packing

class Segment(NamedTuple):
    """Tokens that follow on those of another segment, `parent` (its index, None at a beginning)."""
    ids: list
    parent: int | None


class SegmentGroup(NamedTuple):
    """Segments of similar length whose attention is one padded batch: n segments of at most L
    tokens, which see at most K.
    """
    start: int                     # rows start .. end of the packed tokens are the group's
    end: int
    n: int
    query_rows: torch.Tensor       # (n * L) the group's row at each position, any at padding
    real_positions: torch.Tensor   # (end - start) positions of the n * L that hold real tokens
    key_rows: torch.Tensor         # (n * K) the packed row that each key is taken from
    bias: torch.Tensor             # (n, 1, L, K) float, -inf at keys that a query must not see


class Packed(NamedTuple):
    """Texts side by side, S tokens."""
    input_ids: torch.Tensor     # (1, S)
    position_ids: torch.Tensor  # (1, S)
    groups: list
    rows: list                  # for each text, in the order given, an array of its tokens' rows


def pack_texts(families, device):
    """The Packed of texts. A family is a text (a list of ids) or a list of families, which share
    what all their texts begin with.
    """
    segments, last_segments = [], []
    for family in families:
        add_family(family, 0, None, segments, last_segments)
    rows, order = place_segments(segments)
    ids = np.concatenate([np.array(segments[i].ids, dtype=np.int64) for i in order])
    positions = np.concatenate([np.arange(len(rows[i]) - len(segments[i].ids), len(rows[i]))
                                for i in order])
    return Packed(torch.from_numpy(ids).to(device)[None],
                  torch.from_numpy(positions).to(device)[None],
                  group_segments([(len(segments[i].ids), rows[i]) for i in order], device),
                  [rows[i] for i in last_segments])


def add_family(family, num_shared, parent, segments, last_segments):
    """Appends the segments of a family, whose first `num_shared` tokens the parent ends with."""
    while isinstance(family[0], list) and len(family) == 1:
        family = family[0]
    if isinstance(family[0], list):
        texts = list_texts(family)
        prefix = common_prefix(texts)
    else:
        prefix = family
    segments.append(Segment(prefix[num_shared:], parent))
    parent = len(segments) - 1
    if isinstance(family[0], list):
        for member in family:
            add_family(member, len(prefix), parent, segments, last_segments)
    else:
        last_segments.append(parent)


def list_texts(family):
    """The texts of a family, in their order."""
    if not isinstance(family[0], list):
        return [family]
    return [text for member in family for text in list_texts(member)]


def common_prefix(texts):
    """What all texts begin with."""
    first, last = min(texts), max(texts)  # the two that differ earliest, in the order of lists
    for i, (token, other) in enumerate(zip(first, last)):
        if token != other:
            return first[:i]
    return first


def place_segments(segments):
    """(rows, order): an array of the rows of each segment's tokens, after those of the segments
    before it, and the order in which segments lie side by side.

    Segments that see equally many tokens are neighbours.
    """
    own_lengths = np.array([len(segment.ids) for segment in segments])
    lengths = own_lengths.copy()
    for i, segment in enumerate(segments):
        if segment.parent is not None:  # it comes before its children
            lengths[i] += lengths[segment.parent]
    order = np.lexsort([-own_lengths, -lengths])
    starts = np.empty_like(lengths)
    starts[order] = np.cumsum(own_lengths[order]) - own_lengths[order]
    rows = []
    for i, segment in enumerate(segments):
        own_rows = np.arange(starts[i], starts[i] + own_lengths[i])
        before = [] if segment.parent is None else [rows[segment.parent]]
        rows.append(np.concatenate([*before, own_rows]))
    return rows, order


def group_segments(placed, device):
    """SegmentGroups of [(number of own tokens, rows of all that they see)], whose rows come in
    falling number.
    """
    groups, start = [], 0
    placed = [(own, rows) for own, rows in placed if own]
    lengths = [len(rows) for _, rows in placed]
    for first, last in split_by_length(lengths, GROUP_TOKENS[torch.device(device).type]):
        own_lengths = np.array([own for own, _ in placed[first:last]])
        before = np.array(lengths[first:last]) - own_lengths          # (n) tokens that each follows
        n, L, K = last - first, own_lengths.max(), lengths[first]
        end = start + own_lengths.sum()
        is_real = np.arange(L) < own_lengths[:, None]                 # (n, L)
        query_rows = np.clip(is_real.ravel().cumsum() - 1, 0, None)   # (n * L)
        key_rows = np.zeros((n, K), dtype=np.int64)
        for i, (_, rows) in enumerate(placed[first:last]):
            key_rows[i, :len(rows)] = rows
        last_seen = before[:, None] + np.arange(L)                    # (n, L)
        is_seen = np.arange(K) <= last_seen[:, :, None]               # (n, L, K)
        bias = torch.zeros(n, 1, L, K, device=device)
        bias.masked_fill_(~torch.from_numpy(is_seen)[:, None].to(device), float("-inf"))
        groups.append(SegmentGroup(int(start), int(end), n, torch.from_numpy(query_rows).to(device),
                                   torch.from_numpy(is_real.ravel().nonzero()[0]).to(device),
                                   torch.from_numpy(key_rows.ravel()).to(device), bias))
        start = end
    return groups


# ---------------------------------------------------------------- the forward pass

def packed_causal_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                            groups=None, sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """Attention of packed texts as transformers calls it, (1, S, H, d), a group at a time.

    query (1, H, S, d); key and value (1, H or fewer, S, d). Raises NotImplementedError for what it
    does not do.
    """
    longest = max(group.bias.shape[-1] for group in groups)
    if softcap is not None or s_aux is not None or (sliding_window or longest) < longest:
        raise NotImplementedError("attention with a window, a cap or sinks")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, H, S, d) -> (S, H, d)
    repeats = q.shape[1] // k.shape[1]  # of heads that share keys and values
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for group in groups:
        queries = pad_rows(q[group.start:group.end], group.query_rows, group.n)
        keys = pad_rows(k, group.key_rows, group.n).repeat_interleave(repeats, 1)
        values = pad_rows(v, group.key_rows, group.n).repeat_interleave(repeats, 1)
        y = attention(queries, keys, values, group.bias, dropout, scale)        # (n, H, L, d)
        y = y.transpose(1, 2).flatten(0, 1)                                     # (n * L, H, d)
        outputs.append(y.index_select(0, group.real_positions))
    return torch.cat(outputs)[None], None


def pad_rows(packed, rows, n):
    """The rows of (S, H, d), as (n, H, L, d)."""
    chosen = packed.index_select(0, rows)
    return chosen.view(n, -1, *chosen.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED, packed_causal_attention)


def packed_logits(model, packed, rows):
    """Logits (R, V) of what follows on R rows of packed texts; gradients flow."""
    rows = torch.as_tensor(np.asarray(rows), device=packed.input_ids.device)
    return model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False,
                 groups=packed.groups, logits_to_keep=rows).logits[0]


# ---------------------------------------------------------------- likelihood of answers

@torch.inference_mode()
def score_texts(model, families, is_packed=True):
    """The log-likelihood of each Text's answer given its prompt, summed over its tokens, in their
    order.

    families: lists of Texts (or of such lists) that are likely to begin alike.
    """
    scores = []
    if not is_packed:
        return score_padded(model, [text for family in families for text in list_leaves(family)])
    for part in split_families(families, PASS_TOKENS[model.device.type]):
        texts = [text for family in part for text in list_leaves(family)]
        # nothing is asked of what follows the last token
        packed = pack_texts([to_ids(family) for family in part], model.device)
        rows, targets = [], []
        for text, text_rows in zip(texts, packed.rows):
            rows.append(text_rows[len(text.prompt) - 1:])
            targets += text.answer
        logits = packed_logits(model, packed, np.concatenate(rows))
        scores += sum_by_text(log_likelihoods(logits, targets), texts)
    return scores


def list_leaves(family):
    """The Texts of a family, in their order."""
    if isinstance(family, Text):
        return [family]
    return [text for member in family for text in list_leaves(member)]


def to_ids(family):
    """A family of Texts as one of token ids, without each text's last token."""
    if isinstance(family, Text):
        return (family.prompt + family.answer)[:-1]
    return [to_ids(member) for member in family]


def split_families(families, most_tokens):
    """Yields lists of families of at most so many tokens, shared ones counted once per text; a
    larger family is split.
    """
    part, num_tokens = [], 0
    for family in families:
        current = []
        for member in [family] if isinstance(family, Text) else family:
            size = sum(len(text.prompt) + len(text.answer) for text in list_leaves(member))
            if num_tokens + size > most_tokens and (part or current):
                yield part + ([current] if current else [])
                part, current, num_tokens = [], [], 0
            current.append(member)
            num_tokens += size
        if current:
            part.append(current)
    if part:
        yield part


def log_likelihoods(logits, targets):
    """Log-likelihood (R) of the target ids under logits (R, V)."""
    targets = torch.tensor(targets, device=logits.device)
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sum_by_text(values, texts):
    """Sums of consecutive values, one per answer token, over each text's answer."""
    lengths = [len(text.answer) for text in texts]
    return [part.sum().item() for part in values.double().cpu().split(lengths)]


def score_padded(model, texts):
    """score_texts in plain form, for models that do not take packed texts: padded on the right,
    where causal attention never looks.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].prompt) - len(texts[i].answer))
    lengths = [len(texts[i].prompt) + len(texts[i].answer) for i in order]
    most_texts = 1 if depends_on_longest(model.config) else None
    takes_places = "logits_to_keep" in inspect.signature(model.forward).parameters
    scores = [None] * len(texts)
    for first, last in split_by_length(lengths, PASS_TOKENS[model.device.type], most_texts):
        ids = torch.zeros(last - first, lengths[first], dtype=torch.long)
        is_place = torch.zeros_like(ids, dtype=torch.bool)  # what follows is of the answer
        targets = []
        for row, i in enumerate(order[first:last]):
            text = texts[i]
            ids[row, :lengths[first + row]] = torch.tensor(text.prompt + text.answer)
            is_place[row, len(text.prompt) - 1:lengths[first + row] - 1] = True
            targets += text.answer
        ids, is_place = ids.to(model.device), is_place.to(model.device)
        if takes_places:  # as all but a few do
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=is_place).logits
        else:
            logits = model(input_ids=ids, use_cache=False).logits[is_place]          # (R, V)
        part = sum_by_text(log_likelihoods(logits, targets), [texts[i] for i in order[first:last]])
        for i, score in zip(order[first:last], part):
            scores[i] = score
    return scores
