"""Provide what all scripts share: one-line errors, help texts, processes, progress bars."""
import argparse
import errno
import glob
import math
import os
import re
import reprlib
import resource
import shlex
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches

import torch
import torch.distributed as dist
from tqdm import tqdm

LINE_SECONDS = 60  # seconds between the lines that replace a progress bar


class InputError(Exception):
    """Signal bad input; the message is one line that names the location and the remedy."""


QUOTED = 80  # characters of the input that a message repeats
SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxstring = SHORT_REPR.maxother = QUOTED


def shorten(value):
    """Return a value's repr for a message: in one line, at most QUOTED characters."""
    text = " ".join(SHORT_REPR.repr(value).split())  # a tensor's repr has several lines
    return text if len(text) <= QUOTED else text[:QUOTED - 4] + " ..."


def first_line(error):
    """Return an error's first line, short enough to be part of another message."""
    lines = str(error).strip().splitlines() or [""]
    # the type helps: KeyError's message, for example, is only the key
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 2 * QUOTED else text[:2 * QUOTED - 4] + " ..."


def split_shell_words(place, text):
    """Split a text into words as a shell does.

    `place` names the text in the InputError for a quote that is not closed.
    """
    with refusing(f"{place}: {shorten(text)} cannot be split into words", "close each quote"):
        return shlex.split(text)


@contextmanager
def refusing(problem, remedy):
    """Raise InputError, `problem (reason); remedy`, for any error in the block.

    Use it where other libraries read files. For a truncated file or unexpected content,
    transformers, tokenizers, safetensors, torch, numpy, faiss and bm25s raise about twenty kinds of
    errors without a common base.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:  # either the file is too large or its header is wrong
        raise InputError(f"{problem} (not enough memory); {remedy}, or use a machine with more "
                         "memory") from error
    except Exception as error:
        raise InputError(f"{problem} ({first_line(error)}); {remedy}") from error


# ---------------------------------------------------------------- flags

LOCAL_RANK_FLAG = re.compile(r"--local[-_]rank=(\d+)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every flag's default, and keep the line breaks of the description."""

    def _get_help_string(self, action):
        """Return a flag's help with its default, unless the text describes the default itself."""
        if "default: " in action.help or action.required:
            return action.help
        if action.default in (None, "", []) and action.option_strings:
            return f"{action.help} (default: none)"
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parse flags; an error is one line that suggests the flag that may be meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse flags as argparse does, after moving --local-rank=N into the environment.

        torch.distributed.launch passes that flag; torchrun sets LOCAL_RANK instead.
        """
        kept = []
        for word in sys.argv[1:] if args is None else args:
            launched = LOCAL_RANK_FLAG.fullmatch(word)
            if launched:
                os.environ.setdefault("LOCAL_RANK", launched[1])
            else:
                kept.append(word)
        return super().parse_known_args(kept, namespace)

    def error(self, message):
        """Exit with code 2 after one line on stderr."""
        unknown, hint = [], ""
        if message.startswith("unrecognized arguments"):
            unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if {"--local_rank", "--local-rank"} & set(unknown):
            self.exit(2, "error: --local_rank is not a flag of this script; start the processes "
                         "with torchrun, which sets LOCAL_RANK\n")
        for flag in unknown:
            for likely in get_close_matches(flag, self._option_string_actions, 1):
                hint += f"; did you mean {likely} instead of {flag}?"
        self.exit(2, f"error: {message}{hint} (-h explains the flags)\n")


def parse_boolean(text):
    """Return the boolean that a flag's value spells: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


# add("--bf16", default=False, **SWITCH) accepts --bf16, --bf16 true and --bf16 false
SWITCH = {"type": parse_boolean, "nargs": "?", "const": True, "metavar": "true|false"}

# flags that several scripts have: add("--gpus", **GPUS)
NO_COMPILE = {"action": "store_true",
              "help": "on a GPU, run the layers without torch.compile, which is slower, but saves "
              "the first minute, in which they are compiled"}
GPUS = {"default": "",
        "help": "CUDA_VISIBLE_DEVICES, for example 0,1; default: none, which runs on the CPU"}
RESUME = {"action": "store_true",
          "help": "continue from OUT.state; start from scratch if there is no such file"}
OVERWRITE = {"action": "store_true",
             "help": "replace the OUT of an earlier run, and start from scratch"}
TQDM = {"action": "store_true", "help": "show progress bars even if the output is not a terminal"}


def check_at_least(args, least_values):
    """Raise InputError for a flag that is below its minimum, infinite or nan.

    least_values: {name of a flag: minimum}. A flag may be None.
    """
    for name, least in least_values.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} must be >= {least}, got {shorten(value)}")


def check_positive(args, names):
    """Raise InputError for a flag that is not a finite number above 0."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise InputError(f"--{name} must be > 0, got {value}")


def check_seed(args):
    """Raise InputError if --seed is outside the range that all random generators accept."""
    if not 0 <= args.seed < 2 ** 32:
        raise InputError(f"--seed must be between 0 and {2 ** 32 - 1}, got {shorten(args.seed)}")


def resolve_path(path, data_root):
    """Replace a path's prefix `llm-embedder:` (LLM-Embedder) with data_root; None stays None."""
    prefix = "llm-embedder:"
    if path and path.startswith(prefix):
        return os.path.join(data_root, path.removeprefix(prefix))
    return path


def find_files(path, data_root):
    """Return the sorted files that a pattern with * matches, or [path] for any other path."""
    path = resolve_path(path, data_root)
    if "*" in path:
        return sorted(glob.glob(path)) or [path]
    return [path]


# ---------------------------------------------------------------- processes

@dataclass
class World:
    """Hold this process's rank and device. Without torchrun: rank 0 of a world of size 1."""
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """Return True on rank 0."""
        return self.rank == 0

    def log(self, text):
        """Print a line on the main process."""
        if self.is_main:
            print(text, flush=True)


# How long a process waits for the others. LONG_PATIENCE is for an index that one process builds
# alone, and for long work that is shared unequally.
PATIENCE, LONG_PATIENCE = timedelta(minutes=30), timedelta(days=2)


JOIN_PATIENCE = timedelta(minutes=10)  # how long a process waits until all others have started
JOIN_NOTE = 10                         # seconds after which it logs that it is waiting
LAUNCHERS = {"mpirun": "OMPI_COMM_WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def start_processes(gpus, patience=PATIENCE):
    """Join torchrun's processes (NCCL on GPUs, gloo on CPUs) and return this process's World.

    `gpus` is CUDA_VISIBLE_DEVICES, '' for the CPU. A process waits at most `patience` for the
    others; torchrun ends it at once if another process fails. Raises InputError for a missing GPU,
    or if torchrun's environment variables are missing or wrong.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # read when CUDA is first used, below
    rank, local_rank, size = read_ranks()
    use_cuda = gpus != "" and torch.cuda.is_available()
    if gpus != "" and not use_cuda:
        raise InputError(f"--gpus {gpus}: no CUDA device is available; leave the flag out to run "
                         "on the CPU")
    if use_cuda and local_rank is None and size > 1 and torch.cuda.device_count() > 1:
        raise InputError(f"LOCAL_RANK is not set, so this process cannot choose one of --gpus "
                         f"{gpus}; start the processes with torchrun, or set it")
    local_rank = local_rank or 0
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--gpus {gpus} lists {torch.cuda.device_count()} devices, but process "
                         f"{local_rank} of this machine needs one too; start as many processes as "
                         "there are GPUs")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        # see KERNELS in layers/packed_attention.py; this is for the attention of transformers
        torch.backends.cuda.enable_cudnn_sdp(False)
    if size > 1:
        join_processes("nccl" if use_cuda else "gloo", rank, size, patience)
    return World(rank, local_rank, size, device)


def read_ranks():
    """Return (rank, local rank or None, number of processes) from environment variables.

    Raises InputError if they are missing or contradict each other.
    """
    size = read_number("WORLD_SIZE", 1)
    rank = read_number("RANK", 0)
    local_rank = next((read_number(name, 0) for name in LOCAL_RANKS if name in os.environ), None)
    if not 0 <= rank < size:
        raise InputError(f"RANK={rank} must be below WORLD_SIZE={size}, the number of processes; "
                         "start them with torchrun, which sets both")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise InputError(f"WORLD_SIZE={size} is set, but not {', '.join(missing)}; start the "
                         "processes with torchrun, which sets them, or unset WORLD_SIZE")
    for launcher, name in LAUNCHERS.items():
        if "WORLD_SIZE" not in os.environ and read_number(name, 1) > 1:
            print_error(f"note: {launcher} has started {os.environ[name]} processes, and each runs "
                        "by itself; use torchrun to make them one run")
    return rank, local_rank if size > 1 or "LOCAL_RANK" in os.environ else 0, size


def read_number(name, default):
    """Return the number in an environment variable, or the default if it is not set.

    Raises InputError for any other text.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d+", text.strip()):
        raise InputError(f"{name}={text} in the environment is not a number; unset it, or start "
                         "the processes with torchrun, which sets it")
    return int(text)


def join_processes(backend, rank, size, patience):
    """Start the process group; after JOIN_NOTE seconds, print whom this process is waiting for.

    Raises InputError if the others have not joined after JOIN_PATIENCE, or the port cannot be used.
    """
    host, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    if not 0 < port < 2 ** 16:
        raise InputError(f"MASTER_PORT must be between 1 and {2 ** 16 - 1}, got {port}; choose "
                         "another, or start the processes with torchrun, which sets it")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"MASTER_ADDR={host}, MASTER_PORT={port}: this machine cannot find that "
                         f"address ({first_line(error)}); start the processes with torchrun, or "
                         "set both to the main process's address and port") from None
    place = f"{host}:{port}"
    others = "1 other process" if size == 2 else f"{size - 1} other processes"
    awaited = f"waiting for {others}" if rank == 0 else f"process {rank} is waiting for the others"
    note = threading.Timer(JOIN_NOTE, print_error, [f"{awaited} at {place}"])
    note.daemon = True
    note.start()
    # torchrun runs the store in its own process; without torchrun the main process runs it
    is_keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, size, is_keeper, JOIN_PATIENCE)
        dist.init_process_group(backend, store=dist.PrefixStore("start", store), rank=rank,
                                world_size=size, timeout=patience)
    except (RuntimeError, ValueError, TypeError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise InputError(f"MASTER_PORT={port} is in use by another program on this machine; "
                             "choose another port, or use torchrun --standalone") from None
        raise InputError(f"process {rank} of {size} could not join the others at {place} "
                         f"({first_line(error)}); start all of them with the same MASTER_ADDR and "
                         "MASTER_PORT") from None
    finally:
        note.cancel()


def log_on_main(text):
    """Print a line on the main process, for code that has no World."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def copy_to_device(item, device):
    """Return a copy of a tensor, or of a nested batch of tensors, on the device.

    A copy from pinned memory to a GPU does not wait for the GPU. Everything but tensors, dicts and
    tuples is kept as it is.
    """
    if isinstance(item, torch.Tensor):
        if device.type == "cuda" and item.device.type == "cpu":
            item = item.pin_memory()
        return item.to(device, non_blocking=True)
    if isinstance(item, dict):
        return {name: copy_to_device(value, device) for name, value in item.items()}
    if isinstance(item, tuple):
        values = [copy_to_device(value, device) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else tuple(values)  # NamedTuples
    return item


def start_copy_to_host(tensor):
    """Start the copy of a tensor to the CPU; return a function that waits for it and returns it."""
    copy = tensor.to("cpu", non_blocking=True)  # from a GPU into pinned memory
    if not tensor.is_cuda:
        return lambda: copy
    event = torch.cuda.Event()
    event.record()

    def fetch():
        event.synchronize()
        return copy
    return fetch


def add_over_processes(totals, world):
    """Return the element-wise sums of a tensor over all processes, without waiting for a GPU."""
    if world.size > 1:
        dist.all_reduce(totals)
    return totals


def sum_over_processes(values, world):
    """Return the element-wise sums of a list of numbers over all processes, as floats."""
    totals = torch.tensor(values, dtype=torch.float64, device=world.device)
    return add_over_processes(totals, world).tolist()


def gather_lists(items, world):
    """Return, on every process, all processes' lists of picklable items as one list."""
    if world.size == 1:
        return list(items)
    lists = [None] * world.size
    dist.all_gather_object(lists, list(items))
    return [item for items in lists for item in items]


def wait_for_all(world):
    """Return when all processes have called this function."""
    if world.size > 1:
        dist.barrier()


def run_script(main, args):
    """Run call_main(main, args) and exit with its code."""
    code = call_main(main, args)
    if dist.is_initialized() and code:
        os._exit(code)  # with its peers gone, the process group would block a normal exit
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def call_main(main, args):
    """Call main(args) and return the exit code.

    The code is 0, 1 after one line on stderr for bad input or lost processes, or 130 for Ctrl-C.
    """
    rank = int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0
    same_command = "the same command" + (" with --resume" if hasattr(args, "resume") else "")
    try:
        main(args)
        if dist.is_initialized():
            # exiting closes our sockets, so wait until every peer has read what we sent
            dist.barrier()
        return 0
    except InputError as error:
        # an error from a DataLoader's worker includes its traceback
        message = str(error).split("InputError: ")[-1].strip()
        if rank > 0:
            # If all processes failed, rank 0 prints this message and torchrun ends this process
            # while it sleeps. So this prints only errors that rank 0 did not have.
            time.sleep(3)
        print_error(f"error: {message}" if rank == 0 else f"error on process {rank}: {message}")
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print_error(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); "
                    f"free some disk space and run {same_command} again: half-written files are "
                    "not used")
    except torch.OutOfMemoryError as error:
        print_error(f"error on process {rank}: the GPU's memory is full ({first_line(error)}); "
                    "lower --batch_size or the lengths, or give --bf16 or --use_checkpoint if "
                    f"the script has them; {same_command} continues from what is saved")
    except KeyboardInterrupt:
        print_error(f"interrupted; {same_command} continues from what is saved")
        return 130
    except RuntimeError as error:
        lost_process = any(word in str(error) for word in ("gloo", "NCCL", "Connection", "peer"))
        if not (dist.is_initialized() and lost_process):
            raise
        print_error(f"error on process {rank}: another process ended or cannot be reached "
                    f"({str(error).splitlines()[0][:120]}); see its message; {same_command} "
                    "continues from what is saved")
    return 1


def print_error(message):
    """Print a line on stderr."""
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- progress

class LineBar(tqdm):
    """Print a line about every minute, or every `steps` steps, instead of a bar on a terminal."""

    def __init__(self, *args, steps=None, **options):
        # delay: no line at the start; maxinterval: no lines from tqdm's own thread
        timing = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        if steps:
            timing = {"mininterval": 0, "delay": 1e-9, "miniters": steps}
        super().__init__(*args, maxinterval=math.inf, leave=False, **timing, **options)

    def display(self, msg=None, pos=None):
        """Print the line. tqdm passes a message only to clear a bar, and there is no bar here."""
        if msg is None:
            print(describe_progress(self.format_dict), file=sys.stderr, flush=True)


def describe_progress(state):
    """Return the progress line for a tqdm.format_dict.

    For example: "encoding: 50/1,237 documents, 3.1 s each, 1.0 h left".
    """
    done, total = state["n"], state["total"]
    seconds_each = state["elapsed"] / max(done - state["initial"], 1)
    unit = "" if state["unit"] == "it" else state["unit"]
    line = f"{state['prefix']}: {done:,}"
    if total:
        line += f"/{total:,}"
    if seconds_each < 0.1:
        line += f"{unit}, {1 / max(seconds_each, 1e-9):,.0f}/s"
    else:
        line += f"{unit}, {format_seconds(seconds_each)} each"
    if total:
        line += f", {format_seconds(seconds_each * (total - done))} left"
    if state["postfix"]:
        line += f", {state['postfix']}"
    return line


def format_seconds(seconds):
    """Return seconds as text in a suitable unit: "0.3 s", "12 min", "1.0 h"."""
    number, unit = seconds, "s"
    for larger_unit, size in (("min", 60), ("h", 3600), ("d", 86400)):
        if seconds >= size:
            number, unit = seconds / size, larger_unit
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def peak_bytes(device):
    """Return the peak memory of this process so far, in bytes: GPU memory, or RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def progress_bar(iterable=None, *, desc, is_main=True, always=False, steps=None, **options):
    """Return a tqdm bar on the main process that disappears when done.

    If stderr is not a terminal and `always` is False, it is a LineBar.
    """
    if always or sys.stderr.isatty():
        return tqdm(iterable, desc=desc, leave=False, disable=not is_main, **options)
    return LineBar(iterable, desc=desc, steps=steps, disable=not is_main, **options)
