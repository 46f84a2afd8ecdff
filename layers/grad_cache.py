"""GradCache (Gao et al., arXiv 2101.06983): batches of any size for losses that compare all their
texts with each other.

An in-batch loss needs the vectors of the whole batch, and the backward pass needs every activation
that led to them: the memory grows with the batch. GradCache encodes in chunks, keeps the vectors
only, computes the loss and its gradient at the vectors (the "gradient cache"), then encodes each
chunk a second time and passes its vectors' gradient on to the weights.

    texts -> chunk 1 -> vectors 1 --+
             chunk 2 -> vectors 2 --+-> loss
             chunk n -> vectors n --+
    backward: loss -> gradients at vectors 1 .. n, kept by autograd
                   -> chunk by chunk: encode again, go on to the weights

torch's activation checkpointing around each chunk does exactly that: a checkpoint stores its inputs
and outputs, and recomputes what lies between during the backward pass. Its outputs are the vectors,
so the gradients that autograd holds there are the gradient cache. The random state is replayed, so
dropout drops the same units in both passes.
"""
import torch
from torch.utils.checkpoint import checkpoint

from layers.packed_attention import split_by_length

CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # tokens encoded at a time, padding included


def run_in_chunks(compute, make_inputs, lengths, chunk_size, device):
    """One row per text, (n, ...), in the texts' order, computed for a chunk of texts of similar
    length at a time.

    compute(*make_inputs(indices), lengths) returns the rows of the texts of these indices, whose
    lengths come in falling order; make_inputs returns tensors. With a chunk_size a chunk has at
    most that many texts, and the backward pass recomputes it: memory no longer depends on the
    number of texts. 0 keeps all activations.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    sorted_lengths = [lengths[index] for index in order]
    rows = []
    most_texts = chunk_size or None
    for first, last in split_by_length(sorted_lengths, CHUNK_TOKENS[device.type], most_texts):
        inputs = make_inputs(order[first:last])
        chunk_lengths = sorted_lengths[first:last]
        if chunk_size and torch.is_grad_enabled():
            rows.append(checkpoint(compute, *inputs, chunk_lengths, use_reentrant=False))
        else:
            rows.append(compute(*inputs, chunk_lengths))
    ranks = torch.tensor(order, device=device).argsort()  # where each text lies in the sorted order
    return torch.cat(rows)[ranks]
