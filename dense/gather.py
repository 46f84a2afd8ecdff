"""In-batch negatives across processes: gather the vectors of all processes, differentiably.

Each process encodes its share of the queries and keys. After gather_rows every process holds all
vectors and computes the same loss over all queries, so the keys of one process are negatives for
the queries of the others.
"""
import torch
import torch.distributed as dist


def gather_rows(rows):
    """Return the rows (n_i, ...) of all processes in the order of their ranks, differentiably.
    Without a process group, return the rows themselves.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        return GatherRows.apply(rows)
    return rows


class GatherRows(torch.autograd.Function):
    """Concatenate the rows of all processes, which may differ in number.

    Backward: every process has computed the same loss of all rows, so the gradient at its own rows
    is already complete and needs no communication. Each process then holds a different part of the
    weights' gradient, and DistributedDataParallel averages these parts where a sum is needed.
    Multiplying by the number of processes turns the average into the sum.
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
    """Return [the rows (n_i, ...) of each process], not differentiably. all_gather needs equal
    shapes, so the rows are padded for it.
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
