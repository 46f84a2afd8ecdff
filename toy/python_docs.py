"""Make a corpus of real words: the docstrings of the standard library of the Python that runs this.

    python toy/python_docs.py --out out/real/docs     # a few seconds

corpus.jsonl has a document {"id", "title", "text"} for each public module, class, function, method
and property whose docstring has at least MIN_WORDS words. The id is the qualified name, without
"builtins."; the title is this name with the signature; the text is the first MAX_WORDS words of the
docstring. pairs.jsonl has training pairs that need no questions: the first sentence of a docstring
and the rest (a variant of the inverse cloze task, Lee et al. 2019, arXiv 1906.00300, section 4).
Negatives for the pairs are mined from rests.jsonl, the corpus of the rests: with negatives from
whole docstrings, a ranker would only learn to spot texts that lack their first sentence.

The questions of toy/python_questions.jsonl were written for this, each with the ids of its gold
documents and with answers. For each split of them, SPLIT.jsonl has the questions and answers as the
reader's records, gold.SPLIT.jsonl also the gold documents as contexts, and queries.SPLIT.jsonl and
qrels.SPLIT.tsv are BEIR's files. labelled.jsonl has the training questions with their gold
documents as positives and, for a reader with a frozen retriever, as `passage`.

One version of Python always writes the same files. On Linux, 3.11, 3.12 and 3.13 have all gold
documents. Elsewhere the questions about missing ones are left out, which is printed.
"""
import importlib
import inspect
import json
import random
import re
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import Parser, run_script
from world import write_lines, write_qrels

QUESTIONS = Path(__file__).resolve().parent / "python_questions.jsonl"
SPLITS = ("train", "dev", "test", "check")

# left out: their signatures depend on the installation or on open log files, or torch replaces them
EXCLUDED = {"inspect.getfile", "logging.shutdown", "platform.architecture", "sysconfig.get_path",
            "sysconfig.get_paths"}

MIN_WORDS, MAX_WORDS = 4, 100
MOST_COPIES = 3  # a text that more objects share describes none of them ("An enumeration.")
WORD = re.compile(r"\s*\S+")
# up to a full stop before a capital letter, or to the end of the paragraph
SENTENCE = re.compile(r"(.+?)(?:(?<=\.)\s+(?=[A-Z])|\n\s*\n)", re.DOTALL)
MIN_SENTENCE, MIN_REST = 4, 6  # words of a training pair's two parts

# public modules of Python 3.11 to 3.13 on Linux; those that this build lacks are left out
MODULES = """
abc argparse array ast asyncio asyncio.subprocess atexit base64 bdb binascii bisect builtins bz2
cProfile calendar cmath cmd code codecs codeop collections collections.abc colorsys compileall
concurrent.futures configparser contextlib contextvars copy copyreg csv ctypes ctypes.util
dataclasses datetime dbm dbm.dumb decimal difflib dis doctest email email.base64mime email.charset
email.contentmanager email.encoders email.errors email.generator email.header email.headerregistry
email.iterators email.message email.mime.application email.mime.audio email.mime.base
email.mime.image email.mime.message email.mime.multipart email.mime.nonmultipart email.mime.text
email.parser email.policy email.quoprimime email.utils ensurepip enum errno faulthandler filecmp
fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib
heapq hmac html html.entities html.parser http http.client http.cookiejar http.cookies http.server
imaplib importlib importlib.abc importlib.machinery importlib.metadata importlib.resources
importlib.util inspect io ipaddress itertools json json.decoder json.encoder keyword linecache
locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder
multiprocessing multiprocessing.connection multiprocessing.managers multiprocessing.pool
multiprocessing.shared_memory multiprocessing.sharedctypes netrc numbers operator optparse os
os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats
py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched secrets select
selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap
threading time timeit token tokenize tomllib trace traceback tracemalloc types typing unicodedata
unittest unittest.mock urllib.error urllib.parse urllib.request urllib.response urllib.robotparser
uuid venv warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
wsgiref.util wsgiref.validate xml.dom xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree
xml.parsers.expat xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
""".split()


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="out/real/docs", help="folder to write to")
    return parser.parse_args()


# ---------------------------------------------------------------- documents

def list_documents():
    """Return the documents [{"id", "title", "text"}] in the order of their modules' names.

    An object that several modules export belongs to the one with the fewest dots in its name.
    """
    documents, seen = {}, set()
    for module_name in sorted(MODULES, key=lambda name: (name.count("."), name)):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        if module_name != "os.path":  # its docstring is that of a system's own module
            add_document(documents, module_name, module)
        for name, member in list_members(module, module_name):
            if id(member) not in seen:
                seen.add(id(member))
                full_name = name if module_name == "builtins" else f"{module_name}.{name}"
                add_object(documents, full_name, member)
    copies = Counter(document["text"] for document in documents.values())
    return [document for document in documents.values()
            if copies[document["text"]] <= MOST_COPIES]


def list_members(module, module_name):
    """Return [(name, class or function)] of a module's public names; where it does not list them,
    of those that it defines.
    """
    public = getattr(module, "__all__", None)
    owners = {module_name, f"_{module_name}", None}  # _heapq makes heapq's functions
    members = []
    for name in public or vars(module):
        member = getattr(module, name, None)
        if name.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        if public or getattr(member, "__module__", None) in owners:
            members.append((name, member))
    return members


def add_object(documents, name, member):
    """Add the document of a function, or those of a class and of its own public members."""
    add_document(documents, name, member)
    if not inspect.isclass(member):
        return
    for own_name, own in vars(member).items():
        is_init = own_name == "__init__" and isinstance(own, types.FunctionType)
        if own_name.startswith("_") and not is_init:
            continue
        own = getattr(own, "__func__", own)  # of class methods and static methods
        if inspect.isclass(own):
            if own.__qualname__ == f"{member.__qualname__}.{own_name}":  # defined here
                add_object(documents, f"{name}.{own_name}", own)
        elif inspect.isroutine(own) or inspect.isdatadescriptor(own):
            add_document(documents, f"{name}.{own_name}", own)


def add_document(documents, name, described):
    """Add the document of an object that has a docstring."""
    docstring = getattr(described, "__doc__", None)
    if not isinstance(docstring, str) or name in EXCLUDED or is_foreign(described):
        return
    words = WORD.findall(inspect.cleandoc(docstring))
    if len(words) >= MIN_WORDS:
        documents[name] = {"id": name, "title": name + read_signature(described),
                           "text": "".join(words[:MAX_WORDS])}


def is_foreign(described):
    """Return True for a function of another package: transformers adds some to logging.Logger."""
    function = inspect.unwrap(described) if callable(described) else described
    return (isinstance(function, types.FunctionType)
            and "site-packages" in function.__code__.co_filename)


def read_signature(described):
    """Return a callable's signature without annotations, or "" if Python does not know it."""
    if not callable(described):
        return ""
    try:
        signature = inspect.signature(described)
    except (ValueError, TypeError, AttributeError):  # 3.13 fails to read that of select.poll
        return ""
    parameters = [parameter.replace(annotation=parameter.empty)
                  for parameter in signature.parameters.values()]
    signature = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return re.sub(" at 0x[0-9a-f]+", "", str(signature))  # addresses of default values


# ---------------------------------------------------------------- training pairs without questions

def list_pairs(documents):
    """Return (pairs, rests) of the documents that have both parts. A rest is a document without its
    first sentence; a pair is {"query": this sentence without the object's name, "pos": [the title
    and the rest], "pos_index": [the index of the rest]}.
    """
    pairs, rests = [], []
    for document in documents:
        match = SENTENCE.match(document["text"])
        if match is None:
            continue
        sentence, rest = match.group(1), document["text"][match.end():]
        name = re.escape(document["id"].rpartition(".")[2])
        sentence = " ".join(re.sub(rf"\b{name}\b", "", sentence).split())
        if len(sentence.split()) >= MIN_SENTENCE and len(rest.split()) >= MIN_REST:
            pairs.append({"query": sentence, "pos": [f"{document['title']} {rest}"],
                          "pos_index": [len(rests)], "neg": []})
            rests.append(document | {"text": rest})
    return pairs, rests


# ---------------------------------------------------------------- questions

def read_questions(documents):
    """Return {split: [{"id", "question", "gold", "answers", "kind"}]}.

    Questions with a gold document that is not among the documents are left out, with a note.
    """
    present = {document["id"] for document in documents}
    splits, missing = {split: [] for split in SPLITS}, []
    for line in QUESTIONS.read_text().splitlines():
        question = json.loads(line)
        if present.issuperset(question["gold"]):
            splits[question.pop("split")].append(question)
        else:
            missing += [name for name in question["gold"] if name not in present]
    if missing:
        print(f"note: Python {sys.version.split()[0]} on {sys.platform} has no docstring of "
              f"{len(missing)} gold documents, first {missing[0]}; their questions are left out, "
              "so figures differ from docs/real.md (Python 3.11 to 3.13 on Linux has all)")
    return splits


def write_questions(out, split, questions, documents):
    """Write a split's SPLIT.jsonl, gold.SPLIT.jsonl, queries.SPLIT.jsonl and qrels.SPLIT.tsv, and
    labelled.jsonl for training.
    """
    indices = {document["id"]: index for index, document in enumerate(documents)}
    plain, with_gold, labelled = [], [], []
    for question in questions:
        gold = [indices[name] for name in question["gold"]]
        contexts = [documents[index] for index in gold]
        record = {name: question[name] for name in ("id", "question", "answers", "kind")}
        plain.append(record)
        with_gold.append(record | {"ctxs": contexts})
        texts = [f"{context['title']} {context['text']}" for context in contexts]
        labelled.append(record | {"pos": texts, "pos_index": gold, "passage": contexts})
    write_rows(out / f"{split}.jsonl", plain)
    write_rows(out / f"gold.{split}.jsonl", with_gold)
    if split == "train":
        write_rows(out / "labelled.jsonl", labelled)
    write_qrels(out, split, questions)


def write_rows(path, rows):
    """Write JSON lines."""
    write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def main(args):
    out = Path(args.out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that a later Python has not
        documents = list_documents()
    splits = read_questions(documents)
    pairs, rests = list_pairs(documents)
    random.Random(0).shuffle(pairs)  # neighbours describe the same module
    write_rows(out / "corpus.jsonl", documents)
    write_rows(out / "pairs.jsonl", pairs)
    write_rows(out / "rests.jsonl", rests)
    words = sum(len(document["text"].split()) for document in documents) / len(documents)
    print(f"Python {sys.version.split()[0]}: {len(documents):,} documents of {words:.0f} words on "
          f"average, {len(pairs):,} pairs of a first sentence and the rest")
    for split, questions in splits.items():
        write_questions(out, split, questions, documents)
        print(f"{split}: {len(questions)} questions, for example: {questions[0]['question']}")


if __name__ == "__main__":
    run_script(main, parse_args())
