"""Limit and repeat what is timed, and report the machine."""
import json
import platform
import signal
import statistics
import time
from contextlib import contextmanager

import torch
import transformers


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


def time_rounds(systems, rounds, call):
    """Return {name: seconds of each round}; systems take turns, after an untimed round."""
    times = {name: [] for name in systems}
    for round_index in range(rounds + 1):
        for name, system in systems.items():
            start = time.perf_counter()
            call(system, round_index)
            if round_index > 0:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, slow, fast):
    """Return the median over the rounds of the time of `slow` divided by that of `fast`."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast]))


def describe_machine(device, **versions):
    """Print and return {what: value} of the machine, the date, and the versions of packages, to
    which `versions` adds.
    """
    name = f"{platform.machine()} cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    machine = {"device": name, "threads": torch.get_num_threads(),
               "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
               "transformers": transformers.__version__} | versions
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    return machine


def write_report(path, machine, rows):
    """Write the rows of a benchmark and its machine as JSON, unless there is no path."""
    if path:
        with open(path, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)
