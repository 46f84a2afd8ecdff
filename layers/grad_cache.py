"""GradCache (Gao et al., arXiv 2101.06983): batches of any size for in-batch losses.

An in-batch loss needs the vectors of the whole batch, and the backward pass needs all activations
that led to them, so memory grows with the batch. GradCache encodes in chunks and keeps only the
vectors. It computes the loss and its gradient at the vectors (the "gradient cache"), then encodes
each chunk a second time and propagates its vectors' gradient to the weights.

    texts -> chunk 1 -> vectors 1 --+
             chunk 2 -> vectors 2 --+-> loss
             chunk n -> vectors n --+
    backward: loss -> gradients at vectors 1 .. n, kept by autograd
                   -> chunk by chunk: encode again, propagate to the weights

torch's activation checkpointing of each chunk does exactly that. A checkpoint keeps its inputs and
outputs, and the backward pass computes everything between them again. The outputs are the vectors,
so the gradients that autograd holds there are the gradient cache. The random state is restored, so
dropout drops the same units in both passes.
"""
import torch
from torch.utils.checkpoint import checkpoint

from layers.packing import CHUNK_ROWS, split_by_length
from utils import copy_to_device


def run_in_chunks(compute, make_inputs, lengths, chunk_size, device):
    """Return one row per text, (n, ...), in the order of the texts, computed in chunks of texts of
    similar length.

    compute(make_inputs(indices)) returns the rows of the texts with these indices, which are in
    falling order of their lengths; make_inputs returns a NamedTuple of tensors on the CPU, and
    compute gets it on the device. A chunk has at most chunk_size texts, and the backward pass
    computes it again, so that memory does not grow with the number of texts. chunk_size 0 sets no
    such limit and keeps all activations.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sorted_lengths = [lengths[index] for index in order]
    rows = []
    most_texts = chunk_size or None
    for first, last in split_by_length(sorted_lengths, CHUNK_ROWS[device.type], most_texts):
        inputs = copy_to_device(make_inputs(order[first:last]), device)
        if chunk_size and torch.is_grad_enabled():
            rows.append(checkpoint(compute, inputs, use_reentrant=False))
        else:
            rows.append(compute(inputs))
    ranks = torch.tensor(order).argsort()  # each text's position in the sorted order
    return torch.cat(rows).index_select(0, copy_to_device(ranks, device))
