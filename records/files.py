"""Write files and folders whole or not at all, and lock what several processes write."""
import fcntl
import glob
import gzip
import io
import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np

from utils import InputError, first_line

STREAM = re.compile(r"/dev/std(?:out|err)|/(?:dev|proc/self)/fd/\d+")


@contextmanager
def new_file(path, mode="w"):
    """Yield a file that replaces `path` only when it is complete.

    After kill -9 the old file is still there. Text is gzipped if the name ends in .gz. If the path
    is a link, the file that it points to is replaced. A device or a pipe, such as /dev/stdout, is
    written to directly. Raises InputError if the file cannot be written.
    """
    encoding = None if "b" in mode else "utf-8"
    try:
        if is_stream(path):
            with open(stream_descriptor(path), mode, encoding=encoding) as file:
                yield file
            return
        path = os.path.realpath(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        remove_leftovers(path)
        temporary, file = open_temporary(path, mode, encoding)
    except OSError as error:
        raise unwritable(path, error, "choose another path or make room") from None
    try:
        with file:
            if encoding and path.endswith(".gz"):
                packed = gzip.GzipFile("", "wb", fileobj=file.buffer, mtime=0)
                with io.TextIOWrapper(packed, encoding) as text:
                    yield text
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, temporary):
            raise  # the error is about another file, which the caller was reading
        raise unwritable(path, error, "choose another path or make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def is_stream(path):
    """Return True for a terminal, a pipe or a device.

    /dev/stdout counts as one even if the shell has redirected it to a file.
    """
    if STREAM.fullmatch(str(path)):
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def stream_descriptor(path):
    """Return a copy of the file descriptor that a stream's path names, else the path.

    Opening the path of a redirected stream again would start at its beginning and overwrite what
    has been printed.
    """
    if not STREAM.fullmatch(str(path)):
        return path
    name = os.path.basename(path)
    return os.dup({"stdout": 1, "stderr": 2}.get(name) or int(name))


def open_temporary(path, mode, encoding):
    """Return (name, open file) of the temporary file for `path`, locked while its writer lives."""
    temporary = f"{path}.{os.getpid()}.writing"
    while True:
        file = open(temporary, mode, encoding=encoding)
        take_lock(file, wait=True)
        if os.path.exists(temporary):
            return temporary, file
        # another process removed it as a leftover before the lock was taken
        file.close()


def remove_leftovers(path):
    """Remove the temporary files that killed processes left. Files in use are locked, and stay."""
    for leftover in glob.glob(f"{glob.escape(path)}.[0-9]*.writing"):
        try:
            with open(leftover, "r+b") as file:
                if take_lock(file):
                    os.remove(leftover)
        except OSError:
            pass  # its writer has just finished, or it belongs to another user


def take_lock(file, wait=False, without_locks=False):
    """Lock an open file or folder until it is closed or the process ends; return True on success.

    Returns False if another process holds the lock and `wait` is False. Returns `without_locks` if
    the file system does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


def unwritable(path, error, remedy):
    """Return the InputError for a path that cannot be written."""
    return InputError(f"{path}: cannot be written ({first_line(error)}); {remedy}")


def check_paths(outputs, inputs):
    """Raise InputError for an output that cannot be written, or that would overwrite something.

    An output must not be an input, lie in an input folder, be a folder, or have the name of another
    output. Paths that are None or empty are skipped.
    """
    real_inputs = {os.path.realpath(path) for path in inputs if path}
    folders = [path + os.sep for path in real_inputs if os.path.isdir(path)]
    real_outputs = set()
    for path in filter(None, outputs):
        real_path = os.path.realpath(path)
        if is_stream(path):
            continue
        if real_path in real_inputs:
            raise InputError(f"{path}: is also an input of this command, and would be replaced; "
                             "choose another name")
        if real_path.startswith(tuple(folders)):
            raise InputError(f"{path}: is in a folder that this command reads; choose another "
                             "folder")
        if real_path in real_outputs:
            raise InputError(f"{path}: two outputs have this name; choose another name")
        real_outputs.add(real_path)
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; choose another name")
        if not os.access(os.path.dirname(real_path), os.W_OK):
            raise InputError(f"{path}: its folder does not exist or cannot be written; create it "
                             "first, or choose another name")


def save_folder(folder, *writers):
    """Call each writer(temporary folder), then move the files into `folder`.

    Other files in the folder stay. Raises InputError if it cannot be written.
    """
    try:
        temporary = write_aside(folder, writers)
        move_files(temporary, folder, list_files(temporary))
        shutil.rmtree(temporary)
    except OSError as error:
        raise unwritable(folder, error, "choose another path or make room") from None


def write_aside(folder, writers):
    """Call each writer(temporary folder) and return that folder, FOLDER/.writing."""
    temporary = os.path.join(folder, ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for writer in writers:
        try:
            writer(temporary)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # tokenizers raise a bare Exception if the disk is full
            raise OSError(str(error)) from error
    return temporary


def list_files(folder):
    """Return the sorted paths of all files below a folder, relative to it."""
    paths = []
    for directory, _, names in os.walk(folder):
        paths += [os.path.relpath(os.path.join(directory, name), folder) for name in names]
    return sorted(paths)


def move_files(source, target, paths):
    """Move files (paths relative to the folders) from source to target."""
    for path in paths:
        os.makedirs(os.path.dirname(os.path.join(target, path)), exist_ok=True)
        os.replace(os.path.join(source, path), os.path.join(target, path))


@contextmanager
def lock(folder):
    """Lock a folder while this process writes its files; other processes wait."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise InputError(f"{folder}: is not complete, and cannot be written ({error.strerror}); "
                         "give another --index folder") from None
    with file:
        if not take_lock(file, without_locks=True):
            print(f"{folder}: another process is writing it; waiting", flush=True)
            take_lock(file, wait=True)
        yield


def describe_version(status):
    """Return what changes with a file, [size, time of the last change], from its os.stat."""
    return [status.st_size, status.st_mtime_ns]


def write_array(path, values):
    """Write a numpy array as .npy, whole or not at all. Raises InputError."""
    with new_file(path, "wb") as file:
        # not np.save: it does not notice a full disk
        header = np.lib.format.header_data_from_array_1_0(values)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(values).data)


def write_json(path, content):
    """Write `content` as indented JSON, whole or not at all."""
    with new_file(path) as file:
        json.dump(content, file, indent=2)
