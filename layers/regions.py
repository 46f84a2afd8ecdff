"""Compiled regions: what a layer computes between two attentions, as few kernels on a GPU.

Written in plain torch, a norm alone is six kernels, each of which reads and writes all states.
torch.compile makes few kernels of a function that is marked as a `region`. A region gets the module
whose weights it uses as an argument, and all sizes are dynamic, so one compiled function serves all
layers and batches. The scripts compile on a GPU unless --no_compile is given. On a CPU, and in
programs that do not call compile_on_gpu, the functions run as they are written.
"""
import functools

import torch

from utils import first_line, log_on_main

IS_COMPILED = {"cpu": False, "cuda": False}  # by type of device
BACKEND = "inductor"                         # of torch.compile; tests use aot_eager
# A region is compiled once with and once without gradients, dropout, a cache and so on, and again
# for sizes of 1, which torch treats as constants. torch gives up after 8 versions by default.
MOST_VERSIONS = 64


def compile_on_gpu(is_on):
    """Turn the compilation of regions on a GPU on or off."""
    IS_COMPILED["cuda"] = is_on


def region(function):
    """Return a function of (module, x, ...) that is compiled for the device of the tensor x.

    If torch.compile fails, for example without a C compiler, log the reason and run the function as
    it is written from then on.
    """
    compiled = []

    @functools.wraps(function)
    def run(module, x, *others):
        if IS_COMPILED[x.device.type]:
            if not compiled:
                compiled.append(compile_function(function))
            try:
                return compiled[0](module, x, *others)
            except torch._dynamo.exc.TorchDynamoException as error:
                IS_COMPILED[x.device.type] = False
                cause = getattr(error, "inner_exception", error)
                log_on_main(f"note: torch.compile failed ({first_line(cause)}); the layers run "
                            "slower, as with --no_compile")
        return function(module, x, *others)
    return run


def compile_function(function):
    """Return the compiled function, with dynamic sizes."""
    settings = torch._dynamo.config
    settings.recompile_limit = MOST_VERSIONS
    # it would cut regions in two at the borders of DDP's buckets, where they are one graph each
    settings.optimize_ddp = False
    return torch.compile(function, backend=BACKEND, fullgraph=True, dynamic=True)
