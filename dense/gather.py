"""Where other processes' negatives come in: the vectors of all processes side by side,
differentiable.

Each process encodes its share of the queries and keys. After gather_rows every process holds all
vectors and computes the same loss over all queries, so that the keys of every process are negatives
for the queries of every other one.
"""
import torch
import torch.distributed as dist


def gather_rows(rows):
    """The rows (n_i, ...) of all processes in the order of their ranks, differentiable; without a
    process group the rows themselves.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return GatherRows.apply(rows)
    return rows


class GatherRows(torch.autograd.Function):
    """Concatenates the rows of all processes, whose numbers may differ.

    Backward: every process has computed the same loss of all rows, so the gradient at its own rows
    is already complete, and no communication is needed. DistributedDataParallel will average the
    weights' gradients over the processes, although each holds a different part of their sum;
    multiplying by the number of processes undoes the division.
    """

    @staticmethod
    def forward(ctx, rows):
        parts = gather_tensors(rows)
        rank = dist.get_rank()
        ctx.start = sum(len(part) for part in parts[:rank])
        ctx.end = ctx.start + len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.start:ctx.end] * dist.get_world_size()


def gather_tensors(rows):
    """[the rows (n_i, ...) of each process], not differentiable; all_gather needs equal shapes, so
    rows are padded on the way.
    """
    world_size = dist.get_world_size()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size)]
    dist.all_gather(counts, count)
    counts = torch.cat(counts).tolist()

    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[:len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts)]
