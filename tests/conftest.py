"""What the tests share: tiny random models, records, and running the scripts as a user does."""
import functools
import json
import os
import random
import signal
import socketserver
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

import world

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "toy" / "t5-tiny"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# what the small BERT's vocabulary holds, beside letters
WORDS = """
who wrote it the a of to in and cradle baker stood town letter names river born where is was hobby
did keep which animal lives with this one other two three
""".split()


# ---------------------------------------------------------------- models

def make_t5(folder, **changes):
    """A T5 folder with random weights and the toy tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    settings = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64,
                "num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0,
                "dropout_rate": 0.1}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**settings | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_bert(folder, **changes):
    """A BERT folder with random weights and a small WordPiece vocabulary of words and letters.

    The weights are large, so that texts differ.
    """
    letters = string.ascii_lowercase
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [letter for letter in letters if letter not in WORDS]
    pieces += ["##" + letter for letter in letters]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=64)
    settings = {"vocab_size": len(pieces), "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
                "initializer_range": 0.2, "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    BertModel(BertConfig(**settings | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small T5 folder."""
    return str(make_t5(tmp_path_factory.mktemp("tiny")))


# ---------------------------------------------------------------- records

def make_records(count, contexts=3, seed=0):
    """Records of a small embedded world."""
    rng = random.Random(seed)
    entities, people = world.make_entities(rng, 40, 20, held_out=False)
    passages = []
    for entity in entities:
        passages += world.write_passages(rng, entity, people)
    for index, passage in enumerate(passages):
        passage["id"] = str(index)
    ranker = world.OverlapRanker(passages, blur=0.1)
    return world.make_records(rng, "r", entities, ranker, count, top_k=contexts)


def pad_packed(passages):
    """Return (input_ids, attention_mask), both (B, N, L), of PackedPassages."""
    (B, N), L = passages.counts.shape, int(passages.counts.max())
    ids, mask = torch.zeros(B * N, L, dtype=torch.long), torch.zeros(B * N, L, dtype=torch.bool)
    texts = passages.texts
    for text, (start, length) in enumerate(zip(texts.starts.tolist(), texts.lengths.tolist())):
        ids[text, :length] = texts.ids[start:start + length]
        mask[text, :length] = True
    return ids.view(B, N, L), mask.view(B, N, L)


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    """A file of eleven records."""
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps(make_records(11)))
    return str(path)


# ---------------------------------------------------------------- scripts

def command(script, *args, processes=1):
    """The command line of a script, under torchrun where there are several processes."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1",
                   f"--nproc_per_node={processes}"]
    return launch + [str(ROOT / script), *map(str, args)]


def run(script, *args, processes=1, code=0, cwd=None, stdin=""):
    """Runs a script, of one process or as torchrun starts several, and returns (stdout, stderr);
    fails the test if it exits with another code.
    """
    server = start_server()
    returned, stdout, stderr = server.run(script, args, cwd or os.getcwd(), stdin, processes)
    assert returned == code, stdout + stderr
    return stdout, stderr


def run_and_kill(script, *args, at, processes=1):
    """Runs a script whose processes are killed just before change number `at` of the files in the
    working directory; see SERVER.
    """
    code, stdout, stderr = start_server().run(script, args, os.getcwd(), processes=processes,
                                              kill_at=at)
    assert code == -signal.SIGKILL, stdout + stderr


def run_in_background(script, *args):
    """Start a script in the working directory; return its BackgroundRun."""
    return start_server().start(script, args, os.getcwd())


# A process that has imported what the scripts need, which takes 5 s, and forks for each run. A
# request is a line of JSON, the reply the exit code and the seconds that the run took. A run of
# several processes gets what torchrun sets, and ends as under it: when one of them fails, the
# others are told to end. All of a run is killed after `kill_after` seconds, or just before change
# number `kill_at` of its folder: a file is opened for writing, renamed, removed, a folder made. A
# run ends without taking its interpreter apart, which takes 1.3 s with these libraries. The reply
# to a run in the `background`, which has one process, is its id: it goes on while others run.
SERVER = """
import atexit, importlib, json, os, random, runpy, signal, socket, sys, time, traceback
import bm25s, numpy, faiss, torch, torch.distributed, torch.utils.data, transformers
from transformers import AutoModel, AutoTokenizer, BertModel, T5ForConditionalGeneration
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # as federate.py does
try:
    import flwr.app, flwr.clientapp.mod, flwr.serverapp.strategy
except ImportError:
    pass  # the tests of it are skipped
# what runs with a flag need, which takes 4 s: imported before the first of them
LIBRARIES = {"--lora": "peft.tuners.lora", "--load_in_4bit": "bitsandbytes"}

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime")
changes = 0

def count_changes(request):
    def is_change(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return False
        elif event in CHANGES:
            path = arguments[0]
        else:
            return False
        if not isinstance(path, (str, bytes)):
            return False
        path = os.fsdecode(path)
        return not os.path.isabs(path) or path.startswith(request["cwd"])

    def count(event, arguments):
        global changes
        if is_change(event, arguments):
            changes += 1
            if changes == request["kill_at"]:
                os.killpg(0, signal.SIGKILL)
    sys.addaudithook(count)

def run_script(request):
    code = 0
    count_changes(request)
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    if os.environ.get("RANK", "0") == "0":
        with open(request["stdin"] + ".changes", "w") as file:
            file.write(f"{changes} {code}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def become(request, rank, group, port):
    os.setpgid(0, group)
    signal.alarm(300)
    random.seed()  # as in a new process
    numpy.random.seed()
    if request["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(request["processes"]), "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(request["processes"])}
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    how = os.O_WRONLY | (os.O_APPEND if request["processes"] > 1 else 0)  # one: as a shell's >
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, how), number)
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["args"]]
    sys.path.insert(0, os.path.dirname(request["script"]))

def start(request):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(request["processes"]):
        group = children[0] if children else 0
        child = os.fork()
        if child == 0:
            become(request, rank, group, port)
            run_script(request)
        os.setpgid(child, group or child)  # here, too: whoever is first
        children.append(child)
    return children

def wait(children, kill_at):
    left, code = set(children), 0
    while left:
        for child in sorted(left):
            # the only one is waited for, unless it is to be killed
            is_alone = len(children) == 1 and kill_at is None
            done, status = os.waitpid(child, 0 if is_alone else os.WNOHANG)
            if not done:
                continue
            left.remove(child)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in left:
                    os.kill(other, signal.SIGTERM)
        if left and kill_at is not None and time.monotonic() >= kill_at:
            os.killpg(children[0], signal.SIGKILL)
            kill_at = None
        if left:
            time.sleep(0.001)
    return code

background = []
replies = os.fdopen(os.dup(1), "w")
while line := sys.stdin.readline():
    request, begin = json.loads(line), time.monotonic()
    for flag, library in LIBRARIES.items():
        if flag in request["args"]:
            try:
                importlib.import_module(library)
            except ImportError:
                pass  # the run tells it
    background = [child for child in background if not os.waitpid(child, os.WNOHANG)[0]]
    children = start(request)
    if request["background"]:
        background += children
        print(json.dumps(children[0]), file=replies, flush=True)
        continue
    seconds = request["kill_after"]
    code = wait(children, None if seconds is None else begin + seconds)
    print(json.dumps([code, time.monotonic() - begin]), file=replies, flush=True)
"""


class ScriptServer:
    """Runs scripts in one process each, as `python script.py` does, without its time to start."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env=os.environ | ENVIRONMENT)
        self.folder = tempfile.TemporaryDirectory()
        self.seconds = 0.0  # that the last run took
        self.changes = 0  # that it made to its folder, if it was not killed
        self.started = 0  # runs in the background

    def run(self, script, args, cwd, stdin="", processes=1, **kill):
        """(exit code, stdout, stderr) of a script; `stdin` is what it can read there, a text.

        kill: kill_after or kill_at, see SERVER; the code is -9 then.
        """
        names = ("stdin", "stdout", "stderr")
        paths = {name: os.path.join(self.folder.name, name) for name in names}
        for name, path in paths.items():
            Path(path).write_text(stdin if name == "stdin" else "")
        request = {"script": str(ROOT / script), "args": [str(arg) for arg in args],
                   "cwd": str(cwd), "processes": processes, "kill_after": None, "kill_at": 0,
                   "background": False, **paths, **kill}
        code, self.seconds = self.ask(request)
        if code != -signal.SIGKILL:
            self.changes = int(Path(paths["stdin"] + ".changes").read_text().split()[0])
        return code, Path(paths["stdout"]).read_text(), Path(paths["stderr"]).read_text()

    def start(self, script, args, cwd):
        """Return a BackgroundRun of a script."""
        self.started += 1
        paths = {name: os.path.join(self.folder.name, f"{name}{self.started}")
                 for name in ("stdin", "stdout", "stderr")}
        for path in paths.values():
            Path(path).write_text("")
        request = {"script": str(ROOT / script), "args": [str(arg) for arg in args],
                   "cwd": str(cwd), "processes": 1, "kill_at": 0, "background": True, **paths}
        return BackgroundRun(self.ask(request), paths)

    def ask(self, request):
        """Return the server's reply."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


class BackgroundRun:
    """A run of the ScriptServer that goes on beside the test, much as a Popen."""

    def __init__(self, pid, paths):
        self.pid, self.paths = pid, paths

    def poll(self):
        """Return the exit code, None while the script runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            state = "Z"
        if state != "Z":
            return None
        end = Path(self.paths["stdin"] + ".changes")  # written by a run that was not killed
        return int(end.read_text().split()[1]) if end.exists() else -signal.SIGKILL

    def wait(self, seconds=120):
        """Return the exit code; fail the test after so many seconds."""
        deadline = time.time() + seconds
        while (code := self.poll()) is None:
            assert time.time() < deadline, f"not done in {seconds} s: {self.output()}"
            time.sleep(0.02)
        return code

    def kill(self):
        """Kill the script, and wait for its end."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def output(self):
        """Return what the script has written to stdout and stderr so far."""
        return "".join(Path(self.paths[name]).read_text() for name in ("stdout", "stderr"))


@functools.cache
def start_server():
    """The ScriptServer of this test process; it ends with it."""
    return ScriptServer()


# Runs train_epoch.py, and kills its main process at the last moment before the OUT.state of that
# number is written.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_epoch, training.resume as resume
from utils import run_script
saved = []
write_state = resume.write_state

def write_or_die(path, state):
    saved.append(path)
    if len(saved) == {number} and path.endswith(".state"):
        os.kill(os.getpid(), signal.SIGKILL)
    write_state(path, state)

resume.write_state = write_or_die
run_script(train_epoch.main, train_epoch.parse_args())
"""


def killed_script(folder, number):
    """The path of a script that is train_epoch.py till it is killed, see KILLED."""
    path = folder / "killed.py"
    path.write_text(KILLED.format(root=str(ROOT), number=number))
    return path


# Stands in recipes for `python`: has the ScriptServer run a script. With KILL_AT in the environment
# it then kills the recipe that called it by a command line with these words.
LAUNCHER = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    server.sendall(json.dumps([sys.argv[1:], os.getcwd()]).encode() + b"\\n")
    code, stdout, stderr = json.load(server.makefile())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.stdout.flush()
if os.environ.get("KILL_AT", "nothing") in " ".join(sys.argv):
    os.kill(os.getppid(), signal.SIGKILL)
sys.exit(code)
"""


class LaunchHandler(socketserver.StreamRequestHandler):
    """Answers LAUNCHER's request, ([script, arguments], folder), with (code, stdout, stderr)."""

    def handle(self):
        (script, *args), cwd = json.loads(self.rfile.readline())
        self.wfile.write(json.dumps(start_server().run(script, args, cwd)).encode())


@pytest.fixture(scope="session")
def launcher():
    """The path of a program that runs a script as `python` does, without its time to start."""
    with tempfile.TemporaryDirectory() as folder:  # of a short name, as sockets need it
        address = os.path.join(folder, "socket")
        path = Path(folder) / "launcher"
        path.write_text(LAUNCHER.format(python=sys.executable, address=address))
        path.chmod(0o755)
        with socketserver.UnixStreamServer(address, LaunchHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield str(path)
            server.shutdown()


@pytest.fixture
def run_recipe(launcher, tmp_path):
    """A function(recipe, *flags, code=0, **settings) that runs a recipe of scripts/ into tmp_path /
    "out", and returns (the lines it printed, those of its errors).
    """
    def start(recipe, *flags, code=0, **settings):
        env = {"OUT": tmp_path / "out", "LAUNCH": launcher, "PYTHON": launcher, "GPUS": "",
               "DISK": 1} | settings
        env = os.environ | {name: str(value) for name, value in env.items()}
        process = subprocess.run(["sh", ROOT / "scripts" / recipe, *flags], env=env, timeout=3000,
                                 capture_output=True, text=True)
        assert process.returncode == code, process.stdout + process.stderr
        return process.stdout.splitlines(), process.stderr.splitlines()
    return start


def stages_run(lines):
    """The stages that a recipe ran, by what it printed."""
    return [line[3:] for line in lines if line.startswith("== ") and "done before" not in line]
