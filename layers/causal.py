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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from layers.packed_attention import GROUP_TOKENS, attention, split_by_length

PACKED = "packed_causal"  # the name of packed_causal_attention among transformers' attentions
# tokens of a forward pass: enough to keep the device busy, few enough for the answers' logits
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
# what layers may be called in config.json; others, such as "linear_attention", carry a state along
LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBE = [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11]], [[5, 6, 7, 12, 13]]]  # token ids


class Text(NamedTuple):
    """A prompt and the answer whose likelihood is asked for, as token ids."""
    prompt: list
    answer: list


# ---------------------------------------------------------------- opening


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
