"""What all scripts share: errors told in one line, help texts, processes, progress bars."""
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

import regex
import torch
import torch.distributed as dist
from tqdm import tqdm

# a word, with the blank before it. Scripts without blanks between words: a letter of Chinese or
# Japanese, and five of Thai, Lao, Khmer and Burmese (lb=SA), with the punctuation behind them
BY_LETTER = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc"
CUT_WORD = regex.compile(rf" ?(?:[{BY_LETTER}]\p{{M}}*[\p{{P}}\p{{S}}]*"
                         rf"|(?:\p{{lb=SA}}\p{{M}}*){{1,5}}[\p{{P}}\p{{S}}]*"
                         rf"|[^ {BY_LETTER}\p{{lb=SA}}]+)")

LINE_SECONDS = 60  # between the lines that take a progress bar's place


class InputError(Exception):
    """Bad input, described in one line that names the location and the remedy."""


QUOTED = 80  # characters of the input that a message repeats
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = QUOTED


def shorten(value):
    """A value of the input as a message quotes it: its repr, in one line and not too long."""
    text = " ".join(SHORT.repr(value).split())  # a tensor's has lines
    return text if len(text) <= QUOTED else text[:QUOTED - 4] + " ..."


def cut_words(text, is_joined=False):
    """Return the words of a text, each with the blank before it; the first has one unless the text
    is_joined to what stands before it.

    Words are what blanks separate or, in scripts without blanks between words, a few letters.
    """
    words = CUT_WORD.findall(" ".join(text.split()))
    if words and not is_joined:
        words[0] = " " + words[0]
    return words


def join_words(words):
    """Return the text of words that cut_words has cut."""
    return "".join(words).strip()


def first_line(error):
    """What an error says in one line that is not too long, as a part of another message."""
    lines = str(error).strip().splitlines() or [""]
    # KeyError's message, say, is a key alone
    text = getattr(error, "strerror", None) or f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 2 * QUOTED else text[:2 * QUOTED - 4] + " ..."


def split_shell_words(place, text):
    """The words of a text, as a shell splits it. Raises InputError, with the place that the text is
    from, for a quote that nothing closes.
    """
    with refusing(f"{place}: {shorten(text)} is no list of words", "close each quote"):
        return shlex.split(text)


@contextmanager
def refusing(problem, remedy):
    """Raises InputError, `problem (reason); remedy`, for whatever goes wrong in the block.

    Around what other libraries read: transformers, tokenizers, safetensors, torch, numpy, faiss and
    bm25s raise some twenty kinds of errors, without a common base, for files that are cut off or
    hold something else than they expect.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:  # of a file that says it holds more than it does, or not
        raise InputError(f"{problem} (there is not enough memory for it); {remedy}, or run it "
                         "where there is more") from error
    except Exception as error:  # of any of those kinds
        raise InputError(f"{problem} ({first_line(error)}); {remedy}") from error


# ---------------------------------------------------------------- flags

LOCAL_RANK_FLAG = re.compile(r"--local[-_]rank=(\d+)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show every flag's default, under a description whose lines stay as written."""

    def _get_help_string(self, action):
        """Return a flag's help with its default, unless the help has words for it."""
        if "default: " in action.help or action.required:
            return action.help
        if action.default in (None, "", []) and action.option_strings:
            return f"{action.help} (default: none)"
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one line, which names the flag that may be meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Parse flags as argparse does, but for torch.distributed.launch's --local-rank=N, which
        is put into the environment, where torchrun has it.
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
        unknown, hint = [], ""
        if message.startswith("unrecognized arguments"):
            unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        if {"--local_rank", "--local-rank"} & set(unknown):
            self.exit(2, "error: --local_rank is not a flag here; start the processes with "
                         "torchrun, which sets LOCAL_RANK\n")
        for flag in unknown:
            for likely in get_close_matches(flag, self._option_string_actions, 1):
                hint += f"; for {flag} is {likely} meant?"
        self.exit(2, f"error: {message}{hint} (-h explains the flags)\n")


def parse_boolean(text):
    """The value of a flag that is written out, true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text.lower() == "true"


# add("--bf16", default=False, **SWITCH) accepts --bf16, --bf16 true and --bf16 false
SWITCH = {"type": parse_boolean, "nargs": "?", "const": True, "metavar": "true|false"}


def check_at_least(args, least_values):
    """Raises InputError for a flag that is below its least value, infinite or nan; {name: least
    value}, None is allowed.
    """
    for name, least in least_values.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} must be {least} or more, it is {shorten(value)}")


def check_positive(args, names):
    """Raises InputError for a flag that is not a number above 0; infinity and nan are none."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise InputError(f"--{name} must be above 0, it is {value}")


def check_seed(args):
    """Raises InputError for a --seed that not all random generators take."""
    if not 0 <= args.seed < 2 ** 32:
        raise InputError(f"--seed must be between 0 and {2 ** 32 - 1}, it is {shorten(args.seed)}")


def resolve_path(path, data_root):
    """The path, with LLM-Embedder's prefix `llm-embedder:` replaced by the root; None stays None.
    """
    prefix = "llm-embedder:"
    if path and path.startswith(prefix):
        return os.path.join(data_root, path.removeprefix(prefix))
    return path


def find_files(path, data_root):
    """The sorted files that a pattern with * matches; any other path is itself."""
    path = resolve_path(path, data_root)
    if "*" in path:
        return sorted(glob.glob(path)) or [path]
    return [path]


# ---------------------------------------------------------------- processes

@dataclass
class World:
    """This process among all; a script started without torchrun is rank 0 of a world of size 1."""
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def log(self, text):
        """Prints on the main process."""
        if self.is_main:
            print(text, flush=True)


# how long a process waits for the others; the long one is for an index that one of them makes
# alone, and for long work whose shares are not equal
PATIENCE, LONG_PATIENCE = timedelta(minutes=30), timedelta(days=2)


# how long a process waits at the start until all others are there, and the seconds after which it
# says so
JOIN_PATIENCE, JOIN_NOTE = timedelta(minutes=10), 10
LAUNCHERS = {"mpirun": "OMPI_COMM_WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def start_processes(gpus, patience=PATIENCE):
    """Join torchrun's processes (NCCL on GPUs, gloo on CPUs) and return this one's World.

    `gpus` is CUDA_VISIBLE_DEVICES, '' for the CPU. A process waits for the others no longer than
    `patience`; torchrun ends it at once if one of them fails. Raise InputError for a missing GPU,
    or an environment that is not torchrun's.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # read when CUDA is first used, which is below
    rank, local_rank, size = read_ranks()
    use_cuda = gpus != "" and torch.cuda.is_available()
    if gpus != "" and not use_cuda:
        raise InputError(f"--gpus {gpus}: no CUDA device is usable here; leave the flag out to run "
                         "on the CPU")
    if use_cuda and local_rank is None and size > 1 and torch.cuda.device_count() > 1:
        raise InputError(f"LOCAL_RANK is not set, which says which of --gpus {gpus} is this "
                         "process's; start the processes with torchrun, or set it")
    local_rank = local_rank or 0
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--gpus {gpus} names {torch.cuda.device_count()} devices, but process "
                         f"{local_rank} of this machine needs one too; start as many processes as "
                         "there are GPUs")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if size > 1:
        join_processes("nccl" if use_cuda else "gloo", rank, size, patience)
    return World(rank, local_rank, size, device)


def read_ranks():
    """Return (rank, local rank or None, number of processes) as the environment has them.

    Raise InputError for numbers that cannot be, or parts that are missing.
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
            print_error(f"note: {launcher} has started {os.environ[name]} processes, each of which "
                        "runs by itself; torchrun makes them one run")
    return rank, local_rank if size > 1 or "LOCAL_RANK" in os.environ else 0, size


def read_number(name, default):
    """Return a number of the environment, or the default. Raise InputError for any other text."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d+", text.strip()):
        raise InputError(f"{name}={text} in the environment is not a number; unset it, or start "
                         "with torchrun, which sets it")
    return int(text)


def join_processes(backend, rank, size, patience):
    """Start the process group; after JOIN_NOTE seconds, say whom this process waits for.

    Raise InputError if the others are not there after JOIN_PATIENCE, or the port cannot be used.
    """
    host, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    if not 0 < port < 2 ** 16:
        raise InputError(f"MASTER_PORT={port} must be a port, 1 to {2 ** 16 - 1}; choose another, "
                         "or start with torchrun, which sets it")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"MASTER_ADDR={host}, MASTER_PORT={port} is no address that this machine "
                         f"finds ({first_line(error)}); start the processes with torchrun, or set "
                         "both to those of the main process") from None
    place = f"{host}:{port}"
    others = "1 other process" if size == 2 else f"{size - 1} other processes"
    awaited = f"waiting for {others}" if rank == 0 else f"process {rank} is waiting for the others"
    note = threading.Timer(JOIN_NOTE, print_error, [f"{awaited} at {place}"])
    note.daemon = True
    note.start()
    # torchrun keeps the store in a process of its own; else the main process does
    is_keeper = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(host, port, size, is_keeper, JOIN_PATIENCE)
        dist.init_process_group(backend, store=dist.PrefixStore("start", store), rank=rank,
                                world_size=size, timeout=patience)
    except (RuntimeError, ValueError, TypeError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise InputError(f"MASTER_PORT={port} is in use by another program on this machine; "
                             "choose another port, or start with torchrun --standalone") from None
        raise InputError(f"process {rank} could not join the others of {size} at {place} "
                         f"({first_line(error)}); start all of them, with the same MASTER_ADDR and "
                         "MASTER_PORT") from None
    finally:
        note.cancel()


def log_on_main(text):
    """Print a line on the main process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def sum_over_processes(values, world):
    """Element-wise sums of a list of numbers over all processes, as floats."""
    totals = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def gather_lists(items, world):
    """The concatenation, on every process, of each process's list of picklable items."""
    if world.size == 1:
        return list(items)
    lists = [None] * world.size
    dist.all_gather_object(lists, list(items))
    return [item for items in lists for item in items]


def wait_for_all(world):
    """Returns when all processes have come here."""
    if world.size > 1:
        dist.barrier()


def run_script(main, args):
    """Calls main(args), as call_main does, and ends this process with its exit code."""
    code = call_main(main, args)
    if dist.is_initialized() and code:
        os._exit(code)  # a process group whose peers are gone would hold up a normal end
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def call_main(main, args):
    """Call main(args). Return the exit code: 0, or 1 after one line on stderr for bad input or lost
    processes.
    """
    rank = int(os.environ["RANK"]) if os.environ.get("RANK", "").isdecimal() else 0
    same_command = "the same command" + (" with --resume" if hasattr(args, "resume") else "")
    try:
        main(args)
        if dist.is_initialized():
            # whoever ends closes its connections, in which another may not have read all yet
            dist.barrier()
        return 0
    except InputError as error:
        # a DataLoader's worker sends its traceback too
        message = str(error).split("InputError: ")[-1].strip()
        if rank > 0:
            # rank 0 prints the same; torchrun ends this process meanwhile, unless only this one
            # failed
            time.sleep(3)
        print_error(f"error: {message}" if rank == 0 else f"error on process {rank}: {message}")
    except BrokenPipeError:  # what reads the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print_error(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); "
                    f"make room and start {same_command} again: nothing half-written is taken for "
                    "whole")
    except torch.OutOfMemoryError as error:
        print_error(f"error on process {rank}: the GPU's memory is full ({first_line(error)}); "
                    "lower --batch_size or the lengths, or give --bf16 or --use_checkpoint where "
                    f"the script has them; {same_command} goes on from what is saved")
    except KeyboardInterrupt:
        print_error(f"interrupted; {same_command} goes on from what is saved")
        return 130
    except RuntimeError as error:
        lost_process = any(word in str(error) for word in ("gloo", "NCCL", "Connection", "peer"))
        if not (dist.is_initialized() and lost_process):
            raise
        print_error(f"error on process {rank}: another process ended or is out of reach "
                    f"({str(error).splitlines()[0][:120]}); see its message; {same_command} goes "
                    "on from what is saved")
    return 1


def print_error(message):
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- progress

class LineBar(tqdm):
    """Takes the place of a bar where there is no terminal: a line about every minute, or every
    `steps` steps.
    """

    def __init__(self, *args, steps=None, **options):
        # delay: no line at the very start; maxinterval: none from tqdm's own thread
        timing = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        if steps:
            timing = {"mininterval": 0, "delay": 1e-9, "miniters": steps}
        super().__init__(*args, maxinterval=math.inf, leave=False, **timing, **options)

    def display(self, msg=None, pos=None):
        if msg is None:  # else it is asked to clear the bar
            print(describe_progress(self.format_dict), file=sys.stderr, flush=True)


def describe_progress(state):
    """The line of a bar with this tqdm.format_dict, such as "encoding: 50/1,237 documents, 3.1 s
    each, 1.0 h left".
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
    """Seconds in the unit that suits them: "0.3 s", "12 min", "1.0 h"."""
    number, unit = seconds, "s"
    for larger_unit, size in (("min", 60), ("h", 3600), ("d", 86400)):
        if seconds >= size:
            number, unit = seconds / size, larger_unit
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def peak_bytes(device):
    """The most memory, in bytes, that this process has taken so far: of the GPU, else of the
    machine.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def progress_bar(iterable=None, *, desc, is_main=True, always=False, steps=None, **options):
    """A tqdm bar on the main process that vanishes when done.

    Where stderr is no terminal, unless `always`, it is a line about every minute, or every `steps`
    steps.
    """
    if always or sys.stderr.isatty():
        return tqdm(iterable, desc=desc, leave=False, disable=not is_main, **options)
    return LineBar(iterable, desc=desc, steps=steps, disable=not is_main, **options)
