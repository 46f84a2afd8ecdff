"""Write files and folders whole or not at all, and lock what several processes make."""
import fcntl
import glob
import gzip
import io
import json
import os
import re
import shutil
from contextlib import contextmanager

from utils import InputError, first_line

STREAM = re.compile(r"/dev/std(?:out|err)|/(?:dev|proc/self)/fd/\d+")


@contextmanager
def new_file(path, mode="w"):
    """Yields a file that takes its name only when it is whole: after kill -9 the old one stands.

    Text for a name that ends in .gz is gzipped. A link stays one: the file that it points to is
    replaced. What is no file (/dev/stdout, a pipe) is written to as it is. Raises InputError if the
    file cannot be written.
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
            raise  # of another file, which the caller was reading
        raise unwritable(path, error, "choose another path or make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def is_stream(path):
    """True for what is there and no file: a terminal, a pipe, a device.

    /dev/stdout is one even where the shell has redirected it to a file.
    """
    if STREAM.fullmatch(str(path)):
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def stream_descriptor(path):
    """What to open for a stream: a copy of the descriptor that its path names, or the path.

    A redirected stream opened anew would have a position of its own, and overwrite what is printed.
    """
    if not STREAM.fullmatch(str(path)):
        return path
    name = os.path.basename(path)
    return os.dup({"stdout": 1, "stderr": 2}.get(name) or int(name))


def open_temporary(path, mode, encoding):
    """(name, open file) that becomes `path` when it is whole; locked as long as its writer lives.
    """
    temporary = f"{path}.{os.getpid()}.writing"
    while True:
        file = open(temporary, mode, encoding=encoding)
        take_lock(file, wait=True)
        if os.path.exists(temporary):
            return temporary, file
        # between the two lines another process took it for a leftover
        file.close()


def remove_leftovers(path):
    """Removes what killed processes left of `path` half-written; a live one's file is locked."""
    for leftover in glob.glob(f"{glob.escape(path)}.[0-9]*.writing"):
        try:
            with open(leftover, "r+b") as file:
                if take_lock(file):
                    os.remove(leftover)
        except OSError:
            pass  # its writer has just finished, or it is another user's


def take_lock(file, wait=False, without_locks=False):
    """Locks an open file or folder until it is closed, or its process ends.

    Returns False if another process holds the lock and is not waited for, and `without_locks` on a
    file system that knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


def unwritable(path, error, remedy):
    """The InputError for a path that cannot be written."""
    return InputError(f"{path}: cannot be written ({first_line(error)}); {remedy}")


def check_paths(outputs, inputs):
    """Raises InputError for an output whose folder cannot be written, or that is also an input, in
    an input's folder, or another output.

    Paths that are None or empty are left out.
    """
    real_inputs = {os.path.realpath(path) for path in inputs if path}
    folders = [path + os.sep for path in real_inputs if os.path.isdir(path)]
    real_outputs = set()
    for path in filter(None, outputs):
        real_path = os.path.realpath(path)
        if is_stream(path):
            continue
        if real_path in real_inputs:
            raise InputError(f"{path}: is read by this command too, and would be replaced; choose "
                             "another name")
        if real_path.startswith(tuple(folders)):
            raise InputError(f"{path}: lies in a folder that this command reads; choose another "
                             "one")
        if real_path in real_outputs:
            raise InputError(f"{path}: two outputs have this name; choose another one")
        real_outputs.add(real_path)
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; choose another name")
        if not os.access(os.path.dirname(real_path), os.W_OK):
            raise InputError(f"{path}: its folder does not exist or cannot be written; make it "
                             "first, or choose another name")


def save_folder(folder, *writers):
    """Calls each writer(temporary folder), then moves the files into `folder`.

    What else lies in the folder stays. Raises InputError if it cannot be written.
    """
    try:
        temporary = write_aside(folder, writers)
        move_files(temporary, folder, list_files(temporary))
        shutil.rmtree(temporary)
    except OSError as error:
        raise unwritable(folder, error, "choose another path or make room") from None


def write_aside(folder, writers):
    """Calls each writer(temporary folder) and returns that folder, FOLDER/.writing."""
    temporary = os.path.join(folder, ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for writer in writers:
        try:
            writer(temporary)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # what tokenizers raise for a full disk has no kind
            raise OSError(str(error)) from error
    return temporary


def list_files(folder):
    """The sorted paths of all files below a folder, relative to it."""
    paths = []
    for directory, _, names in os.walk(folder):
        paths += [os.path.relpath(os.path.join(directory, name), folder) for name in names]
    return sorted(paths)


def move_files(source, target, paths):
    """Moves files from folder to folder."""
    for path in paths:
        os.makedirs(os.path.dirname(os.path.join(target, path)), exist_ok=True)
        os.replace(os.path.join(source, path), os.path.join(target, path))


@contextmanager
def lock(folder):
    """Lets one process at a time make what the folder is for; others wait, and find it made."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise InputError(f"{folder}: is not whole yet, and cannot be written ({error.strerror}); "
                         "give another --index folder") from None
    with file:
        if not take_lock(file, without_locks=True):
            print(f"{folder}: another process is making it; waiting", flush=True)
            take_lock(file, wait=True)
        yield


def write_json(path, content):
    """Writes `content` as indented JSON, whole or not at all."""
    with new_file(path) as file:
        json.dump(content, file, indent=2)
