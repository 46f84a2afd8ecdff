"""Texts as the rows of one matrix, arranged on the CPU before a GPU sees them.

Linear layers, norms and dropout work on each row alone, so texts of different lengths can share a
matrix. Only attention depends on where a text begins. The texts are therefore sorted by length, and
each gets a multiple of ALIGN rows. Neighbouring texts with equally many rows are a group, whose
rows are a batch (n, L) without any copying. With ALIGN 4:

    texts          rows of the packed matrix                     groups
    a a a a a a    a a a a a a - -  c c c c c - - -  b b b -     n = 2 texts of L = 8 rows: a, c
    b b b                                                        n = 1 text of L = 4 rows: b
    c c c c c

Everything here follows from lengths that are known on the CPU, so that no step has to wait until a
GPU has computed a size.
"""
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

# Fewer groups are fewer kernels, and a GPU's attention kernel loads 16 rows at a time. With 8 rows
# on a CPU, passages of 100 to 240 tokens have 2 % padding; without any, small models are slower.
ALIGN = {"cpu": 8, "cuda": 16}
GROUP_ROWS = {"cpu": 1024, "cuda": 131072}  # most rows of a group; a CPU's cache holds 1024
CHUNK_ROWS = {"cpu": 4096, "cuda": 131072}  # most rows that are encoded at a time


class Shape(NamedTuple):
    """Describe a group: n neighbouring texts of L rows each."""
    n: int
    L: int
    is_padded: bool  # some text has fewer than L tokens


class PackedTexts(NamedTuple):
    """Hold n texts as S rows. The rows are in falling order of the texts' lengths; starts and
    lengths are in the order in which the texts were given.
    """
    ids: torch.Tensor      # (S) token ids, with padding after each text
    is_real: torch.Tensor  # (S) bool, False at padding
    texts: torch.Tensor    # (S) index of each row's text
    starts: torch.Tensor   # (n) first row of each text
    lengths: torch.Tensor  # (n) number of tokens of each text
    shapes: list           # Shapes of the groups, in the order of the rows


def pack_texts(texts, padding_id, device_type="cpu", align=None):
    """Return texts, lists or arrays of token ids, as PackedTexts on the CPU, arranged for a type of
    device.

    A text has a multiple of `align` rows (default: ALIGN), or none if it has no token.
    """
    align = align or ALIGN[device_type]
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))            # (n)
    rows = -(-lengths // align) * align
    order = np.argsort(-lengths, kind="stable")
    starts = np.empty_like(rows)
    starts[order] = rows[order].cumsum() - rows[order]
    S = int(rows.sum())

    text_of_row = np.repeat(order, rows[order])                                         # (S)
    is_real = np.arange(S) - starts[text_of_row] < lengths[text_of_row]                 # (S)
    ids = np.full(S, padding_id, dtype=np.int64)
    sorted_texts = [texts[index] for index in order]
    # an empty list becomes an array of floats, so the type is forced
    ids[is_real] = np.concatenate(sorted_texts, dtype=np.int64, casting="unsafe")
    arrays = map(torch.from_numpy, (ids, is_real, text_of_row, starts, lengths))
    shapes = list_shapes(lengths[order].tolist(), rows[order].tolist())
    return PackedTexts(*arrays, cut_shapes(shapes, GROUP_ROWS[device_type]))


def list_shapes(lengths, rows):
    """Return the Shapes of texts with these lengths and numbers of rows, in falling order."""
    shapes, first = [], 0
    for L, equal in groupby(rows):
        n = len(list(equal))
        if L:
            # lengths fall, so the last text of a group is its shortest
            shapes.append(Shape(n, L, lengths[first + n - 1] < L))
        first += n
    return shapes


def cut_shapes(shapes, most_rows):
    """Return Shapes of at most most_rows rows, or of a single text."""
    pieces = []
    for n, L, is_padded in shapes:
        most_texts = max(1, most_rows // L)
        for first in range(0, n, most_texts):
            pieces.append(Shape(min(most_texts, n - first), L, is_padded))
    return pieces


def split_chunks(packed):
    """Return [(ids (S), is_real (S), Shapes)] of runs of groups with at most CHUNK_ROWS rows, or of
    a single group.
    """
    most_rows = CHUNK_ROWS[packed.ids.device.type]
    chunks, sizes = [], []
    for shape in packed.shapes:
        rows = shape.n * shape.L
        if not chunks or sizes[-1] + rows > most_rows:
            chunks.append([])
            sizes.append(0)
        chunks[-1].append(shape)
        sizes[-1] += rows
    return list(zip(packed.ids.split(sizes), packed.is_real.split(sizes), chunks))


def split_by_length(lengths, most_tokens, most_texts=None):
    """Yield (first, last) of consecutive runs of texts, whose lengths are given in falling order.

    A run, padded to its longest text, has at most `most_tokens` tokens, unless it is a single text,
    and at most `most_texts` texts.
    """
    first = 0
    while first < len(lengths):
        n = max(1, most_tokens // max(1, lengths[first]))
        if most_texts is not None:
            n = min(n, most_texts)
        last = min(first + n, len(lengths))
        yield first, last
        first = last
