"""What a federation trains, and how: a retriever by train_dense.py's functions, a reader by
train_epoch.py's.

federate.py passes in both scripts as modules. They use the same names: FREE_FLAGS, check_args,
list_inputs, set_up, plan_run, train_update, count_warmup, evaluate, keep_measures, save_best. All
their differences are handled in this file or in federate.py's make_party_args.
"""
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from training.loop import set_seed
from utils import World


@dataclass(frozen=True)
class Settings:
    """Hold the values of federate.py's flags of the same names, which its help explains."""
    model: str            # OUT, without a slash at its end
    mode: str             # retriever, generator, or alternate for both in turns
    rounds: int           # in alternation, of each model in each turn
    turns: int
    local_epochs: int
    local_updates: int    # updates of a client in a round; 0: as many as local_epochs needs
    local_optimizer: str  # adamw or sgd
    transport: str        # float32 or bf16
    retrieve_flags: str
    score_flags: str
    strategy: list        # [NAME, PARAMETER=VALUE, ...]
    privacy: list         # the same, or None
    num_clients: int      # clients that must be online for a round
    min_clients: int      # results that a round needs
    attempts: int
    timeout: float        # seconds
    patience: float       # seconds
    resume: bool

    @property
    def total_rounds(self):
        """Return the rounds of each model; its learning rate rises and falls over all of them."""
        return self.rounds * (self.turns if self.mode == "alternate" else 1)


@dataclass
class Task:
    """Hold one model that is trained, and the script that trains it."""
    mode: str            # retriever or generator
    script: ModuleType   # train_dense or train_epoch
    words: list          # the script's flags after federate.py's `--`, which all parties share
    make_args: Callable  # make_args(out, ...) returns a party's flags, see make_party_args

    def open(self, args, world, sets):
        """Return the script's Run of these flags; sets: what it reads, of "train" and "dev".

        Raises InputError.
        """
        self.script.check_args(args, sets)
        set_seed(args.seed)  # all parties draw the same values for weights that start at random
        return self.script.set_up(args, world, sets)

    def list_inputs(self):
        """Return {path: whether to hash the whole file} for the files that the shared flags name.

        The reader's dev set with contexts, which alternation makes in each turn, is not among them.
        """
        args = self.make_args("out")
        self.script.check_args(args, ["dev"] if self.measures_on(args) else [])
        return self.script.list_inputs(args)

    def measures_on(self, args):
        """Return True if the flags name something to measure the model on."""
        if self.mode == "retriever":
            return bool(args.eval_data or args.eval_qrels)
        return args.data_val is not None or args.eval_file is not None

    def describe_measures(self, measures):
        """Return the measures of script.evaluate as a part of a line."""
        if self.mode == "generator":
            return f"dev EM {measures['dev_em']:.2f} ({measures['correct']}/{measures['count']})"
        return " ".join(f"{name} {value:.4f}" for name, value in measures.items()
                        if name != "eval_seconds")


@dataclass
class PartyWorld(World):
    """Hold a World whose log lines start with a party's name, since a process may run several
    parties.
    """
    party: str = ""

    def log(self, text):
        super().log(f"{self.party}: {text}")


def name_party(world, party):
    """Return the PartyWorld of a World."""
    return PartyWorld(world.rank, world.local_rank, world.size, world.device, party)


def trained_parameters(run):
    """Return {name: parameter} of the weights that are trained; only these travel."""
    return {name: parameter for name, parameter in run.unwrapped.named_parameters()
            if parameter.requires_grad}
