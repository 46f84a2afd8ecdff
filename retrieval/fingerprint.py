"""Fingerprint what an index is made from, and compare it before the index is used."""
import os

from records.files import lock, unwritable
from records.hashes import CORPUS_WINDOWS, hash_file, hash_windows, model_files
from records.reading import read_settings
from utils import InputError, gather_lists, shorten, wait_for_all

INDEX_ENDINGS = (".npy", ".faiss", ".json")  # an index's own files, bm25s's included
# the fingerprint of a BM25 index that is being built; it is renamed to index.json at the end
UNFINISHED = "unfinished.json"
# settings of older indices, whose index.json lacks them
FORMER_SETTINGS = {"words": "bm25s", "end_token": True, "format": 1}


def fingerprint(corpus, model, settings, world):
    """Return {name: value} of all that an index depends on: corpus files, model files, settings.

    Files are compared by size and content. model: a folder, a file, a hub name, or None for BM25.
    The main process hashes the model's files for all. Every process hashes windows of its own
    corpus, because another machine may have a different file.
    """
    files = []
    for part in corpus.parts:  # names are left out, because a corpus may be renamed
        files.append(["", os.path.getsize(part.path), hash_windows(part.path, CORPUS_WINDOWS)])
    hashes = []
    if world.is_main and model is not None:
        for path in model_files(model):
            hashes.append([os.path.basename(path), os.path.getsize(path), hash_file(path)])
    files += gather_lists(hashes, world)  # only the main process has hashes
    is_hub_name = model is not None and not os.path.exists(model)
    return {"documents": len(corpus), "model": str(model) if is_hub_name else "", "files": files,
            **settings}


def read_fingerprint(folder):
    """Return (fingerprint, whether the index is finished); the fingerprint is empty without one."""
    given = read_settings(os.path.join(folder, "index.json"))
    if given:
        return given, True
    return read_settings(os.path.join(folder, UNFINISHED)), False


def check_fingerprint(folder, expected):
    """Return True if the folder's index has this fingerprint, False if there is no index or it is
    not finished.

    Raises InputError for another fingerprint, or if the folder holds other files.
    """
    given, is_finished = read_fingerprint(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    # a folder in which an index is being made has .lock from the start
    if "documents" not in given and (given or names and ".lock" not in names):
        raise InputError(f"{folder}: holds files that do not belong to an index, such as "
                         f"{min(names)}, and is left as it is; give another --index folder")
    if not given:
        return False
    given = FORMER_SETTINGS | given
    changed = [name for name in expected if given.get(name) != expected[name]]
    if "documents" in changed:
        count = shorten(given.get("documents"))
        raise InputError(f"{folder} holds an index of {count} documents, and the corpus has "
                         f"{expected['documents']}; documents cannot be added to an index: delete "
                         "this one, and the same command makes it again, or give another --index "
                         "folder")
    if changed == ["files"]:
        raise InputError(f"{folder}: the corpus or the model has changed since this index was "
                         "made; delete it, and the same command makes it again, or give another "
                         "--index folder")
    if changed:
        first = changed[0]
        raise InputError(f"{folder} holds an index of another {', '.join(changed)} ({first}: "
                         f"{shorten(given.get(first))}, now {shorten(expected[first])}); give "
                         "the flags it was made with, another --index folder, or delete this one")
    return is_finished


def is_former_format(folder, expected):
    """Return True if the folder's index differs from the expected one only in its file format."""
    given, _ = read_fingerprint(folder)
    given = FORMER_SETTINGS | given
    return [name for name in expected if given.get(name) != expected[name]] == ["format"]


def remove_other_index(folder, expected):
    """Remove the files of the folder's index if it has another fingerprint.

    index.json is removed last, so that a folder left by kill -9 still has the other fingerprint.
    Raises InputError if files cannot be removed.
    """
    given, _ = read_fingerprint(folder)
    if given:
        given = FORMER_SETTINGS | given
    if "documents" not in given or all(given.get(name) == expected[name] for name in expected):
        return
    with lock(folder):
        remove_index(folder)


def remove_index(folder):
    """Remove the files of the folder's index, the fingerprint last. Raises InputError."""
    names = [name for name in os.listdir(folder) if name.endswith(INDEX_ENDINGS)]
    try:
        for name in sorted(names, key=lambda name: name in ("index.json", UNFINISHED)):
            os.remove(os.path.join(folder, name))
    except OSError as error:
        raise unwritable(folder, error, "give another --index folder") from None


def await_index(folder, expected, world):
    """Return when the main process has made the folder's index.

    Raises InputError on a process that does not see it.
    """
    wait_for_all(world)
    if not check_fingerprint(folder, expected):
        raise InputError(f"{folder}: process {world.rank} does not see the index that process 0 "
                         "made; put the folder on a shared disk")
