"""Causal language models over packed texts: no padding, and a shared prefix is computed once.

The tokens of all texts form one row (1, S) of a forward pass, so linear layers, norms and the
embedding waste nothing on padding. Texts with the same prefix share its rows:

    texts               segments             rows of the packed input
    k n o w  a b        k n o w              a b c d e k n o w
    k n o w  c d e          a b
                            c d e

A token attends to the earlier tokens of its segment and to all tokens of the segments before it in
its text. Its position is counted in the whole text. Only the attention function and the position
ids differ from a plain forward pass of the transformers model.

Scoring and training run whole texts. To generate answers, PackedPrompts runs the prompts in the
same way, keeps their keys and values, and then runs one token per prompt and step.
"""
import inspect
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from layers.packed_attention import attention
from layers.packing import split_by_length

PACKED = "packed_causal"  # the name of packed_causal_attention among transformers' attentions
# tokens per forward pass: many enough to keep the device busy, few enough that the logits fit
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
# tokens, padding included, whose attention is computed at a time; a CPU's cache holds 1024
GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}
# layer_types in config.json that can be packed; others, such as "linear_attention", carry a state
LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBE = [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11]], [[5, 6, 7, 12, 13]]]  # token ids


class Text(NamedTuple):
    """Hold the token ids of a prompt and of the answer to score."""
    prompt: list
    answer: list


# ---------------------------------------------------------------- which models can be packed

def why_not_packed(model, longest=None):
    """Return the reason why a model cannot take packed texts of at most `longest` tokens. If it
    can, set its attention to packed_causal_attention and return None.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [])
    if layer_types - LAYER_TYPES or getattr(config, "attention_chunk_size", None):
        return "layers that are not causal attention to the whole text"
    if exceeds_window(config, longest):
        return f"attention to {config.sliding_window} tokens only"
    if depends_on_longest(config):
        return "positions that depend on the longest text of a batch"
    own_attention = config._attn_implementation
    if not agrees_when_packed(model):
        model.set_attn_implementation(own_attention)
        return "an attention of its own"
    return None


def exceeds_window(config, longest):
    """Return True if texts of `longest` tokens, or of any number if that is None, may be longer
    than the attention's sliding window.
    """
    window = getattr(config.get_text_config(), "sliding_window", None)
    return bool(window) and (longest is None or longest > window)


def depends_on_longest(config):
    """Return True if the longest text of a batch changes the position embeddings of all texts."""
    return "longrope" in str(getattr(config.get_text_config(), "rope_parameters", None))


@torch.inference_mode()
def agrees_when_packed(model):
    """Set the packed attention; return True if the PROBE's logits equal those of single texts.

    They differ for a model that does more than causal attention, for example with ALiBi or a state.
    The last tokens are also run as a step of their own, as in generation.
    """
    texts = list_texts(PROBE)
    expected = torch.stack([
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
        for ids in texts])
    last_tokens = torch.tensor([ids[-1] for ids in texts], device=model.device)
    try:
        model.set_attn_implementation(PACKED)
        packed = pack_families(PROBE, model.device)
        logits = packed_logits(model, packed, [rows[-1] for rows in packed.rows])
        prompts = PackedPrompts(model, [[ids[:-1] for ids in texts]], 1, model.device)
        prompts.start()
        step_logits = prompts.step(last_tokens[prompts.order])
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError):
        return False  # the model has only its own attention, or does not pass `groups` on to ours
    return (are_close(logits, expected) and are_close(step_logits, expected[prompts.order]))


def are_close(logits, expected):
    """Return True if logits equal the expected ones, except for rounding errors."""
    if logits.shape != expected.shape:  # the model ignores logits_to_keep
        return False
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


# ---------------------------------------------------------------- packing

class Segment(NamedTuple):
    """Hold tokens that follow another segment in one or more texts."""
    ids: list
    parent: int | None  # index of the segment before; None if a text begins here


class SegmentGroup(NamedTuple):
    """Hold the indices and the bias that make the attention of n segments one padded batch.

    A segment has at most L tokens, and these attend to at most K.
    """
    start: int                     # the group's tokens are rows start .. end of the packed ones
    end: int
    n: int
    query_rows: torch.Tensor       # (n * L) row within the group of each query; any at padding
    real_positions: torch.Tensor   # (end - start) positions in n * L that hold real tokens
    key_rows: torch.Tensor         # (n * K) packed row of each key
    bias: torch.Tensor             # (n, 1, L, K) float, -inf where a query must not see a key


class Packed(NamedTuple):
    """Hold texts as one row of S tokens."""
    input_ids: torch.Tensor     # (1, S)
    position_ids: torch.Tensor  # (1, S)
    groups: list                # SegmentGroups
    rows: list                  # for each text, in the order given, an array of its tokens' rows


def pack_families(families, device):
    """Return texts as Packed. A family is a text (a list of ids) or a list of families; the prefix
    common to all its texts becomes one segment.
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
    """Append the segments of a family. Its first `num_shared` tokens are in the segments up to
    `parent`.
    """
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
    """Return the texts of a family in order."""
    if not isinstance(family[0], list):
        return [family]
    return [text for member in family for text in list_texts(member)]


def common_prefix(texts):
    """Return the longest common prefix of lists of ids."""
    first, last = min(texts), max(texts)  # in lexicographic order, these two differ earliest
    for i, (token, other) in enumerate(zip(first, last)):
        if token != other:
            return first[:i]
    return first


def place_segments(segments):
    """Return (rows, order) of segments. rows: for each segment, an array of the rows of its text's
    tokens up to the end of the segment. order: in which to pack the segments.

    Segments whose last tokens attend to equally many tokens are neighbours.
    """
    own_lengths = np.array([len(segment.ids) for segment in segments])
    lengths = own_lengths.copy()
    for i, segment in enumerate(segments):
        if segment.parent is not None:  # a parent stands before its children in the list
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
    """Return the SegmentGroups of [(number of own tokens, rows of the tokens they attend to)],
    sorted by falling number of rows.
    """
    groups, start = [], 0
    placed = [(own, rows) for own, rows in placed if own]
    lengths = [len(rows) for _, rows in placed]
    for first, last in split_by_length(lengths, GROUP_TOKENS[torch.device(device).type]):
        own_lengths = np.array([own for own, _ in placed[first:last]])
        before = np.array(lengths[first:last]) - own_lengths          # (n) tokens before a segment
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
                            groups=None, prompts=None, sliding_window=None, softcap=None,
                            s_aux=None, **kwargs):
    """Return the attention output (1, S, H, d) of packed texts, and None for the weights.

    transformers calls it, with query (1, H, S, d), and key and value (1, H or fewer heads, S, d).
    groups: the texts' SegmentGroups. prompts: the PackedPrompts that keep the keys and values or,
    without groups, that take a step. With neither, the texts are padded, and transformers' own
    attention is called. Raise NotImplementedError for a sliding window shorter than a text, soft
    caps and sinks.
    """
    if groups is None and prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      dropout=dropout, softcap=softcap, s_aux=s_aux, **kwargs)
    longest = (prompts.count_longest() if groups is None
               else max(group.bias.shape[-1] for group in groups))
    if softcap is not None or s_aux is not None or (sliding_window or longest) < longest:
        raise NotImplementedError("attention with a window, a cap or sinks")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, H, S, d) -> (S, H, d)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if groups is None:
        return prompts.attend(module, q, k, v, scale)[None], None
    if prompts is not None:
        prompts.store(module, k, v)
    repeats = q.shape[1] // k.shape[1]  # heads that share one key and value
    outputs = []
    for group in groups:
        queries = select_rows(q[group.start:group.end], group.query_rows, group.n)
        keys = select_rows(k, group.key_rows, group.n).repeat_interleave(repeats, 1)
        values = select_rows(v, group.key_rows, group.n).repeat_interleave(repeats, 1)
        y = attention(queries, keys, values, group.bias, dropout, scale)        # (n, H, L, d)
        y = y.transpose(1, 2).flatten(0, 1)                                     # (n * L, H, d)
        outputs.append(y.index_select(0, group.real_positions))
    return torch.cat(outputs)[None], None


def select_rows(packed, rows, n):
    """Return the rows (n * L) of packed (S, H, d) as (n, H, L, d)."""
    chosen = packed.index_select(0, rows)
    return chosen.view(n, -1, *chosen.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED, packed_causal_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for padded texts


def packed_logits(model, packed, rows, prompts=None):
    """Return the logits (R, V) at R rows of packed texts, with gradients.

    prompts: the PackedPrompts that keep the keys and values, or None.
    """
    rows = torch.as_tensor(np.asarray(rows), device=packed.input_ids.device)
    return run_rows(model, packed.input_ids, packed.position_ids, rows, groups=packed.groups,
                    prompts=prompts)


def run_rows(model, input_ids, position_ids, rows, **options):
    """Return the logits (R, V) at R rows of tokens (1, S); `options` are passed to
    packed_causal_attention.
    """
    # a mask of four dimensions keeps transformers from building one, of S * S entries
    no_mask = torch.zeros(1, 1, 1, 1, device=input_ids.device)
    return model(input_ids=input_ids, position_ids=position_ids, attention_mask=no_mask,
                 use_cache=False, logits_to_keep=rows, **options).logits[0]


# ---------------------------------------------------------------- generation

class PromptGroup(NamedTuple):
    """Describe n prompts of at most P tokens, whose keys are a batch padded on the left."""
    n: int
    P: int
    key_rows: torch.Tensor  # (n * P) packed row of each key; any at padding
    bias: torch.Tensor      # (n, 1, 1, P + most steps) float, -inf at padding; None: no padding


class PackedPrompts:
    """Run K prompts as packed texts, and then one token for each of them per step.

    start() runs the prompts, step() the next tokens, keep() drops prompts. Tokens and logits are in
    the order `order` of the prompts, by falling length. Each layer's keys and values are kept as a
    padded batch (n, H, P + most_steps, d) of each group, in which a step fills one column, so that
    nothing is copied from step to step.
    """

    def __init__(self, model, families, most_steps, device):
        """Set the prompts, families as in pack_families. step() is called at most `most_steps`
        times.
        """
        self.model, self.most_steps, self.num_steps = model, most_steps, 0
        self.packed = pack_families(families, device)
        lengths = np.array([len(rows) for rows in self.packed.rows])
        order = np.argsort(-lengths, kind="stable")
        self.order = torch.from_numpy(order).to(device)                             # (K)
        self.positions = torch.from_numpy(lengths[order]).to(device)                # (K)
        rows = [self.packed.rows[i] for i in order]
        runs = split_by_length(lengths[order], GROUP_TOKENS[torch.device(device).type])
        self.groups = [self.make_group(rows[first:last]) for first, last in runs]
        self.layers = {}  # {attention module: [(keys, values) of each group]}

    def make_group(self, rows):
        """Return the PromptGroup of prompts, given the packed rows of each, the longest first."""
        n, P = len(rows), len(rows[0])
        key_rows = np.zeros((n, P), dtype=np.int64)
        bias = np.zeros((n, 1, 1, P + self.most_steps), dtype=np.float32)
        for i, own_rows in enumerate(rows):
            padding = P - len(own_rows)
            key_rows[i, padding:] = own_rows
            bias[i, ..., :padding] = -np.inf
        device = self.order.device
        bias = torch.from_numpy(bias).to(device) if len(rows[-1]) < P else None
        return PromptGroup(n, P, torch.from_numpy(key_rows.ravel()).to(device), bias)

    def start(self):
        """Run the prompts; return the logits (K, V) of the next tokens."""
        last_rows = np.array([rows[-1] for rows in self.packed.rows])[self.order.cpu().numpy()]
        return packed_logits(self.model, self.packed, last_rows, self)

    def step(self, tokens):
        """Run the next tokens (K) of the prompts; return the logits (K, V) of those after them."""
        rows = torch.arange(len(tokens), device=tokens.device)
        positions = self.positions + self.num_steps
        logits = run_rows(self.model, tokens[None], positions[None], rows, prompts=self)
        self.num_steps += 1
        return logits

    def keep(self, kept):
        """Drop the prompts where the mask kept (K) is False."""
        self.order, self.positions = self.order[kept], self.positions[kept]
        kept = [part.nonzero()[:, 0] for part in kept.split([group.n for group in self.groups])]
        self.groups = [
            group._replace(n=len(rows), bias=None if group.bias is None else group.bias[rows])
            for group, rows in zip(self.groups, kept) if len(rows)]
        for module, layer in self.layers.items():
            self.layers[module] = [
                (keys, values) if len(rows) == len(keys) else (keys[rows], values[rows])
                for (keys, values), rows in zip(layer, kept) if len(rows)]

    def count_longest(self):
        """Return how many keys the longest text has in the current step."""
        return self.groups[0].P + self.num_steps + 1

    def store(self, module, k, v):
        """Keep the keys and values (S, H, d) of the packed prompts in a layer, with room for the
        steps.
        """
        layer = []
        for group in self.groups:
            parts = []
            for packed in (k.to(v.dtype), v):  # autocast leaves keys in float32
                part = packed.new_empty(group.n, packed.shape[1], group.P + self.most_steps,
                                        packed.shape[2])
                part[:, :, :group.P] = select_rows(packed, group.key_rows, group.n)
                parts.append(part)
            layer.append(parts)
        self.layers[module] = layer

    def attend(self, module, q, k, v, scale):
        """Add a step's keys and values (K, H or fewer, d) to a layer; return the attention output
        (K, H, d) of its queries.
        """
        outputs, first = [], 0
        for group, (keys, values) in zip(self.groups, self.layers[module]):
            last, column = first + group.n, group.P + self.num_steps
            keys[:, :, column], values[:, :, column] = k[first:last], v[first:last]
            # heads that share keys are queries of one head: (n, H, d) -> (n, key heads, repeats, d)
            queries = q[first:last].unflatten(1, (k.shape[1], -1))
            bias = None if group.bias is None else group.bias[..., :column + 1]
            y = attention(queries, keys[:, :, :column + 1], values[:, :, :column + 1], bias, 0.0,
                          scale)
            outputs.append(y.flatten(1, 2))
            first = last
        return torch.cat(outputs)


# ---------------------------------------------------------------- likelihood of answers

@torch.inference_mode()
def score_answers(model, families, is_packed=True):
    """Return log p(answer | prompt) of each Text in order, summed over the answer's tokens.

    families: nested lists of Texts; those in one list should share a prefix. Without `is_packed`
    the texts are padded (score_padded).
    """
    if not is_packed:
        return score_padded(model, [text for family in families for text in list_leaves(family)])
    scores = []
    for part in split_families(families, PASS_TOKENS[model.device.type]):
        texts = [text for family in part for text in list_leaves(family)]
        # one outer family, because a template's instructions are common to all texts
        packed = pack_families([[to_ids(family) for family in part]], model.device)
        rows, targets = [], []
        for text, text_rows in zip(texts, packed.rows):
            rows.append(text_rows[len(text.prompt) - 1:])
            targets += text.answer
        logits = packed_logits(model, packed, np.concatenate(rows))
        scores += sum_by_text(log_likelihoods(logits, targets), texts)
    return scores


def list_leaves(family):
    """Return the Texts of a family in order."""
    if isinstance(family, Text):
        return [family]
    return [text for member in family for text in list_leaves(member)]


def to_ids(family):
    """Return a family of Texts as a family of token ids, without each text's last token, whose
    logits are not needed.
    """
    if isinstance(family, Text):
        return (family.prompt + family.answer)[:-1]
    return [to_ids(member) for member in family]


def split_families(families, most_tokens):
    """Yield lists of families to pack together, of about `most_tokens` tokens each. A larger family
    is split between its members.

    A prefix that a text shares with the previous one is not counted, although packing shares only
    what a whole family has in common.
    """
    part, num_tokens, previous = [], 0, []
    for family in families:
        current = []
        for member in [family] if isinstance(family, Text) else family:
            texts = [text.prompt + text.answer for text in list_leaves(member)]
            size = count_new(texts, previous)
            if num_tokens + size > most_tokens and (part or current):
                yield part + ([current] if current else [])
                part, current, num_tokens = [], [], 0
                size = count_new(texts, [])
            current.append(member)
            num_tokens += size
            previous = texts[-1]
        if current:
            part.append(current)
    if part:
        yield part


def count_new(texts, previous):
    """Return the number of tokens in `texts`, without the prefix that each shares with the text
    before it; `previous` comes before the first.
    """
    pairs = zip(texts, [previous, *texts])
    return sum(len(text) - len(common_prefix([text, other])) for text, other in pairs)


def log_likelihoods(logits, targets):
    """Return the log-likelihoods (R) of R target ids under logits (R, V)."""
    targets = torch.tensor(targets, device=logits.device)
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sum_by_text(values, texts):
    """Return for each text the sum of its values, one per answer token; `values` holds those of
    all texts in order.
    """
    lengths = [len(text.answer) for text in texts]
    return [part.sum().item() for part in values.double().cpu().split(lengths)]


def score_padded(model, texts):
    """Return what score_answers returns, in plain form, for models that do not take packed texts:
    texts are padded on the right, where causal attention never looks.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].prompt) - len(texts[i].answer))
    lengths = [len(texts[i].prompt) + len(texts[i].answer) for i in order]
    most_texts = 1 if depends_on_longest(model.config) else None
    takes_mask = "logits_to_keep" in inspect.signature(model.forward).parameters
    scores = [None] * len(texts)
    for first, last in split_by_length(lengths, PASS_TOKENS[model.device.type], most_texts):
        ids = torch.zeros(last - first, lengths[first], dtype=torch.long)
        is_kept = torch.zeros_like(ids, dtype=torch.bool)  # True where an answer token follows
        targets = []
        for row, i in enumerate(order[first:last]):
            text = texts[i]
            ids[row, :lengths[first + row]] = torch.tensor(text.prompt + text.answer)
            is_kept[row, len(text.prompt) - 1:lengths[first + row] - 1] = True
            targets += text.answer
        ids, is_kept = ids.to(model.device), is_kept.to(model.device)
        if takes_mask:
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=is_kept).logits
        else:
            logits = model(input_ids=ids, use_cache=False).logits[is_kept]           # (R, V)

        part = sum_by_text(log_likelihoods(logits, targets), [texts[i] for i in order[first:last]])
        for i, score in zip(order[first:last], part):
            scores[i] = score
    return scores
