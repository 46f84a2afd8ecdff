"""Files: JSON and lines read with errors that name FILE:LINE; files and folders written whole or
not at all.
"""
import codecs
import fcntl
import glob
import gzip
import io
import json
import os
import shutil
import zlib
from contextlib import contextmanager

from utils import InputError

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # and their descriptors

# ---------------------------------------------------------------- reading

def open_text(path):
    """A text file object, gunzipped where the name ends in .gz."""
    opener = gzip.open if str(path).endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: some files begin with a byte order mark


def read_json(path):
    """[(object, location)] of a list of objects, or of one object per line; either may be .json.

    A location is 'FILE:LINE' or 'FILE, record N'. Raises InputError for a missing, unreadable,
    empty or malformed file.
    """
    path = str(path)
    try:
        with open_text(path) as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); is it a whole .json or .jsonl file, "
                         "or one gzipped?") from None
    beginning = text.lstrip()[:1]
    is_lines = path.removesuffix(".gz").endswith(".jsonl") and beginning != "["
    if is_lines or beginning == "{":  # LLM-Embedder's .json files hold lines
        return parse_lines(text.split("\n"), path)  # splitlines would also split at U+2028
    if not beginning:
        raise InputError(f"{path}: the file is empty; it must hold a list of records")
    objects = parse_json(text, path, 1)
    if not isinstance(objects, list):
        raise InputError(f"{path}: holds one {type(objects).__name__}, not a list of records or "
                         "one record per line")
    return [(item, f"{path}, record {index}") for index, item in enumerate(objects)]


def parse_lines(lines, path):
    """[(object, 'FILE:LINE')] of JSON lines; empty ones are skipped."""
    parsed = []
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            item = parse_json(line.rstrip("\n"), path, line_number)
            parsed.append((item, f"{path}:{line_number}"))
    return parsed


def parse_json(text, path, first_line):
    """The object that `text` spells.

    Raises InputError with file, line and column where it spells none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: not valid JSON at column {error.colno} ({error.msg}); "
                         "the file may be cut off there: fetch it again or mend the line") from None


def read_lines(path):
    """Yields the lines of a file as bytes, gunzipped; a JSON list yields one line per item.

    Raises InputError.
    """
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            beginning = file.peek(4)[:4].removeprefix(codecs.BOM_UTF8)
            if beginning.startswith(b"["):
                for item, _ in read_json(path):
                    yield json.dumps(item).encode() + b"\n"
                return
            for index, line in enumerate(file):
                yield line.removeprefix(codecs.BOM_UTF8) if index == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path, or fetch the file "
                         "again") from None


# ---------------------------------------------------------------- writing

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
            # standard streams by their descriptor: a file opened anew would have a position of its
            # own, and overwrite what is printed
            descriptor = os.dup(STREAMS[path]) if path in STREAMS else path
            with open(descriptor, mode, encoding=encoding) as file:
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
        raise unwritable(path, error, "choose another path or make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def is_stream(path):
    """True for what is there and no file: a terminal, a pipe, a device.

    /dev/stdout is one even where the shell has redirected it to a file.
    """
    is_file_or_folder = os.path.isfile(path) or os.path.isdir(path)
    return path in STREAMS or os.path.exists(path) and not is_file_or_folder


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
        except FileNotFoundError:
            pass  # its writer has just finished


def take_lock(file, wait=False):
    """Locks an open file until it is closed, or its process ends.

    Returns False if another process holds the lock and is not waited for, or the file system knows
    no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def unwritable(path, error, remedy):
    """The InputError for a path that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")


def check_paths(outputs, inputs):
    """Raises InputError for an output whose folder cannot be written, or that is also an input.

    Paths that are None or empty are left out.
    """
    real_inputs = {os.path.realpath(path) for path in inputs if path}
    for path in filter(None, outputs):
        real_path = os.path.realpath(path)
        if is_stream(path):
            continue
        if real_path in real_inputs:
            raise InputError(f"{path}: is read by this command too, and would be replaced; choose "
                             "another name")
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; choose another name")
        if not os.access(os.path.dirname(real_path), os.W_OK):
            raise InputError(f"{path}: its folder does not exist or cannot be written; make it "
                             "first, or choose another name")


def save_folder(folder, *writers):
    """Calls each writer(temporary folder), then moves the files into `folder`.

    What else lies in the folder stays. Raises InputError if it cannot be written.
    """
    temporary = os.path.join(folder, ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        for writer in writers:
            writer(temporary)
        move_files(temporary, folder, list_files(temporary))
        shutil.rmtree(temporary)
    except OSError as error:
        raise unwritable(folder, error, "choose another path or make room") from None


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is making it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def write_json(path, content):
    """Writes `content` as indented JSON, whole or not at all."""
    with new_file(path) as file:
        json.dump(content, file, indent=2)


def read_args(folder):
    """The content of a checkpoint's args.json, or {} where it has none.

    Raises InputError if it is no JSON.
    """
    path = os.path.join(str(folder), "args.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); mend it, or delete it to do "
                         "without") from None
