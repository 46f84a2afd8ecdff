"""The folder that a run writes: locked while the run lasts, saved whole or not at all."""
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress

import torch
import transformers
from safetensors import SafetensorError

from records.files import (
    list_files,
    move_files,
    remove_leftovers,
    take_lock,
    unwritable,
    write_aside,
    write_json,
)
from records.reading import read_args
from utils import InputError, shorten


def versions():
    """Return the versions of Python, torch and transformers."""
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__}


@contextmanager
def claim_folder(out, resume, overwrite, world):
    """Reserve OUT for this run while the context lasts, and clean up what killed runs left
    half-written there.

    Only `resume` and `overwrite` allow the run to replace an earlier run's model, state and log;
    nothing allows it to replace other files. Raises InputError, on the main process, if OUT holds
    anything that would be replaced without permission, if another run is using it, or if it cannot
    be written.
    """
    if not world.is_main:
        yield
        return
    if not out:
        raise InputError("the model's folder is '' or '/'; give another one")
    is_new = not os.path.exists(out)
    descriptor = lock_output(out)
    try:
        try:
            check_claim(out, resume, overwrite)
            finish_saving(out)
        except OSError as error:
            raise unwritable(out, error, "choose another path") from None
        for path in (f"{out}.state", f"{out}.jsonl"):
            remove_leftovers(os.path.realpath(path))
        if resume and not os.path.exists(f"{out}.state"):
            world.log(f"note: there is no {out}.state to resume from; starting from scratch")
        yield
    finally:
        if is_new:
            with suppress(OSError):
                os.rmdir(out)  # fails unless the folder is empty
        os.close(descriptor)


def lock_output(out):
    """Lock the folder OUT, which is created if necessary, and return its file descriptor.

    Raises InputError if OUT cannot be written, or if another run still holds the lock after ten
    seconds. (The loader processes of a killed run keep the lock for some seconds.)
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise InputError(f"{out}: is a file, but the model needs a folder; choose another path")
    for _ in range(20):
        try:
            os.makedirs(out, exist_ok=True)
            descriptor = os.open(out, os.O_RDONLY)
            if not os.access(out, os.W_OK):
                raise PermissionError("its permissions forbid it")
        except OSError as error:
            raise unwritable(out, error, "choose another path") from None
        is_locked = take_lock(descriptor, without_locks=True)
        # an earlier run may have removed the folder after it was opened here
        if is_locked and os.path.exists(out) and os.path.samestat(os.fstat(descriptor),
                                                                  os.stat(out)):
            return descriptor
        os.close(descriptor)
        time.sleep(0.5)
    raise InputError(f"{out}: another run is writing there; wait until it ends, or choose another "
                     "folder")


def check_claim(out, resume, overwrite):
    """Raise InputError if a run that writes OUT, OUT.state and OUT.jsonl would replace anything
    that it must not replace.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run, --overwrite starts from scratch; leave one out")
    names = os.listdir(out)
    holds_checkpoint = list_checkpoint(out) is not None or ".writing" in names
    if names and not holds_checkpoint:
        if "versions" in read_args(out):
            raise InputError(f"{out}: was written by an earlier version of this code, which did "
                             "not list its files; choose another folder, or delete this one")
        raise InputError(f"{out}: holds files that no run has written, such as {min(names)}, "
                         "which will not be touched; choose another folder")
    for path, *marks in ((f"{out}.state", b"PK"), (f"{out}.jsonl", b'"loss_curve"', b'"round"')):
        if not any(holds_mark(path, mark) for mark in marks):
            raise InputError(f"{path}: was not written by a run, and this run would replace "
                             "it; choose another name for the folder")
    used = out if holds_checkpoint else f"{out}.state"
    if os.path.exists(used) and not (resume or overwrite):
        raise InputError(f"{used}: holds an earlier run; --resume continues it, --overwrite "
                         "replaces it, or choose another folder")


def holds_mark(path, mark):
    """Return True if a file's first line contains these bytes, or the file is empty or missing."""
    if not os.path.exists(path):
        return True
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        line = file.readline(10 ** 6)
    return not line or mark in line


def save_checkpoint(folder, info, *writers):
    """Write a model folder: the files of the writers, and args.json with `info` and the list of the
    files.

    writers: functions that write into a given folder. Files of the previous checkpoint are removed,
    all others stay. If the process is killed, the folder holds the previous checkpoint, or the next
    run completes the new one. Raises InputError if the folder cannot be written.
    """
    try:
        finish_saving(folder)
        temporary = write_aside(folder, writers)
        files = list_files(temporary)
        umask = os.umask(0)
        os.umask(umask)
        for path in files:
            with open(os.path.join(temporary, path), "rb") as file:
                os.fsync(file.fileno())  # before args.json marks the folder as complete
                os.fchmod(file.fileno(), 0o666 & ~umask)  # safetensors lets only the owner read
        write_json(os.path.join(temporary, "args.json"), info | {"files": files})
        finish_saving(folder)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error, "choose another path or make room") from None


def finish_saving(folder):
    """Move a complete checkpoint from FOLDER/.writing to FOLDER, or remove an incomplete one."""
    temporary = os.path.join(folder, ".writing")
    files = list_checkpoint(temporary)
    if files is not None:  # complete, because args.json was written last
        move_files(temporary, folder, [path for path in list_files(temporary)
                                       if path != "args.json"])
        for path in list_checkpoint(folder) or []:
            if path not in files:
                remove_file(folder, path)
        move_files(temporary, folder, ["args.json"])
    shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoint(folder):
    """Return the paths, relative to the folder, that its args.json lists as the checkpoint's files,
    or None if it has no such list.

    Raises InputError if the list holds anything else, such as paths of another folder.
    """
    files = read_args(folder).get("files")
    if files is None:
        return None
    are_paths = isinstance(files, list) and all(isinstance(path, str) for path in files)
    if not are_paths or any(os.path.isabs(path) or ".." in path.split("/") for path in files):
        raise InputError(f"{folder}/args.json: 'files' must list files of the folder, got "
                         f"{shorten(files)}; choose another folder")
    return files


def remove_file(folder, path):
    """Remove a file below a folder, if it exists, and the folders that this leaves empty."""
    with suppress(OSError):
        os.remove(os.path.join(folder, path))
        while path := os.path.dirname(path):
            os.rmdir(os.path.join(folder, path))
