"""Limit and repeat what is timed."""
import signal
import statistics
import time
from contextlib import contextmanager

import torch


@contextmanager
def time_limit(seconds):
    """Raise TimeoutError inside the block after this many seconds."""
    def stop(*_):
        raise TimeoutError(f"takes more than {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_for(device):
    """Wait until a GPU has done all its work; calls on a CPU have waited already."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_calls(call, device, rounds, warm_ups=2):
    """Return the median seconds of a call, after warm-ups."""
    seconds = []
    for round_index in range(warm_ups + rounds):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        if round_index >= warm_ups:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
