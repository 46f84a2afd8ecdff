"""Processes, random states, files that are never half-written, and logs: what all scripts share."""
import argparse
import ctypes
import errno
import fcntl
import gzip
import io
import json
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class InputError(Exception):
    """Bad input, told in one line that names the place and the remedy."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with every flag's default, under a description whose lines stay as written."""


# ---------------------------------------------------------------------------------------------------- processes

@dataclass
class World:
    """This process among all; a script started without torchrun is rank 0 of a world of 1."""
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, text):
        """Prints on the main process."""
        if self.is_main:
            print(text, flush=True)


def start_processes(gpus, patience=timedelta(minutes=30)):
    """Joins torchrun's processes (NCCL on GPUs, gloo on CPUs); `gpus` is CUDA_VISIBLE_DEVICES, '' for the CPU.

    A process waits for the others no longer than `patience`; torchrun ends it at once if one of them fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # read when CUDA is first used, which is below
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    use_cuda = gpus != "" and torch.cuda.is_available()
    if gpus != "" and not use_cuda:
        raise InputError(f"--gpus {gpus}: no CUDA device is usable here; leave the flag out to run on the CPU")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"--gpus {gpus} gives {torch.cuda.device_count()} devices, but process {local_rank} of this machine "
                         "wants one too; start as many processes as there are GPUs")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        tune_allocator()
    if size > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=patience)
    return World(rank, local_rank, size, device)


def tune_allocator():
    """Fewer page faults on a Linux CPU, 10 % of a training step: large pages, and what is freed is kept for the next tensors.

    Tensors above 32 MiB are returned at once, so that memory stays flat. Must run before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2 ** 25)      # M_MMAP_THRESHOLD
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc: nothing but a little time is lost


def sum_over_processes(values, world):
    """Element-wise sums of a list of numbers over all processes, as floats."""
    totals = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def wait_for_all(world):
    """Returns when all processes have come here."""
    if world.size > 1:
        dist.barrier()


def gather_lists(items, world):
    """The concatenation, on every process, of each process's list of picklable items."""
    if world.size == 1:
        return list(items)
    parts = [None] * world.size
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def run_script(main, args):
    """Calls main(args); bad input and lost processes become one line on stderr and exit code 1."""
    rank, again = int(os.environ.get("RANK", 0)), "the same command" + (" with --resume" if hasattr(args, "resume") else "")
    try:
        main(args)
        code = 0
    except InputError as error:
        error = str(error).split("InputError: ")[-1].strip()  # a DataLoader's worker sends its traceback with it
        if rank > 0:
            time.sleep(3)  # rank 0 says the same; torchrun ends this process meanwhile, unless only this one failed
        print(f"error: {error}" if rank == 0 else f"error on process {rank}: {error}", file=sys.stderr, flush=True)
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); make room and start {again} again: "
              "nothing half-written is taken for whole", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print(f"interrupted; {again} goes on from what is saved", file=sys.stderr, flush=True)
        code = 130
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "Connection", "peer")):
            raise
        print(f"error on process {rank}: another process ended or is out of reach ({str(error).splitlines()[0][:120]}); see its "
              f"message; {again} goes on from what is saved", file=sys.stderr, flush=True)
        code = 1
    if dist.is_initialized() and code:
        os._exit(code)  # a process group whose peers are gone would hold up a normal end
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------- random states

def set_seed(seed, rank=0):
    """Seeds dropout with seed + rank; the order of samples and the choice of answers have seeds of their own (data.py)."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def random_states(device):
    """This process's random states, for the resume file."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states, device):
    """Sets what random_states() returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


# ---------------------------------------------------------------------------------------------------- files

@contextmanager
def new_file(path, mode="w"):
    """A file that takes its name only when it is whole: after kill -9 the old one stands. InputError if it cannot be written.

    Text for a name that ends in .gz is gzipped.
    """
    path = os.path.abspath(path)
    temporary = f"{path}.{os.getpid()}.writing"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            if path.endswith(".gz") and "b" not in mode:
                with io.TextIOWrapper(gzip.GzipFile("", "wb", fileobj=file.buffer, mtime=0), "utf-8") as packed:
                    yield packed
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another path or make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_folder(folder, *writers):
    """Calls each writer(temporary folder), then moves the files into `folder`, the weights last.

    What else lies in the folder stays. Raises InputError if it cannot be written.
    """
    temporary = os.path.join(folder, ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        for writer in writers:
            writer(temporary)
        paths = [os.path.relpath(os.path.join(place, name), temporary) for place, _, names in os.walk(temporary) for name in names]
        for path in sorted(paths, key=lambda path: path.endswith(".safetensors")):
            os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
            os.replace(os.path.join(temporary, path), os.path.join(folder, path))
        shutil.rmtree(temporary)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another path or make room") from None


def check_writable(folder):
    """InputError at the start, not after an epoch, if the model folder or the files beside it cannot be written."""
    try:
        os.makedirs(os.path.join(folder, ".writing"), exist_ok=True)
        os.rmdir(os.path.join(folder, ".writing"))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another path") from None
    with new_file(f"{folder.rstrip('/')}.probe"):
        pass
    os.remove(f"{folder.rstrip('/')}.probe")


@contextmanager
def lock(folder):
    """Lets one process at a time make what the folder is for; others wait, and find it made."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise InputError(f"{folder}: is not whole yet, and cannot be written ({error.strerror}); give another --index folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is making it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def write_json(path, content):
    """`content` as indented JSON, whole or not at all."""
    with new_file(path) as file:
        json.dump(content, file, indent=2)


def read_args(folder):
    """What a checkpoint's args.json says, or {} where it has none."""
    path = os.path.join(str(folder), "args.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); mend it, or delete it to do without") from None


# ---------------------------------------------------------------------------------------------------- logs

class RunLog:
    """Lines on the console, rows in a JSONL file and, if asked for, TensorBoard; silent on all but the main process."""

    def __init__(self, path, is_main, keep_rows=0, tensorboard=None):
        """Keeps the first `keep_rows` rows of the file, those that a resumed run has already written."""
        self.path, self.is_main, self.rows, self.board = path, is_main, [], None
        if not is_main:
            return
        if keep_rows and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.rows = file.read().split("\n")[:keep_rows]
        with new_file(path) as file:
            file.writelines(row + "\n" for row in self.rows)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self.board = SummaryWriter(tensorboard)

    def say(self, text):
        if self.is_main:
            print(text, flush=True)

    def row(self, row, step):
        """Appends a JSON row; its numbers go to TensorBoard at `step`."""
        if not self.is_main:
            return
        self.rows.append(json.dumps(row))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self.rows[-1] + "\n")
        for name, value in row.items():
            if self.board and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)
