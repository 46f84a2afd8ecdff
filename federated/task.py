"""What a federation trains: the retriever by train_dense.py's functions, the reader by
train_epoch.py's.

Both scripts have the same functions: set_up, plan_run, train_update, count_warmup, evaluate,
keep_measures, save_best. Everything that differs between the two stands in this file.
"""
from dataclasses import dataclass

import train_dense
import train_epoch
from training.loop import set_seed
from utils import InputError, World


@dataclass
class Task:
    """One model that is trained, and how."""
    mode: str                  # retriever or generator
    arguments: list            # the training script's flags, which all clients and the server share

    @property
    def script(self):
        """The module of the training script."""
        return train_dense if self.mode == "retriever" else train_epoch

    def parse(self, out, own_arguments, data=None):
        """The script's flags as a Namespace, with a party's own flags behind the shared ones.

        Raises InputError for a flag that the script does not have.
        """
        arguments = [*self.arguments, *own_arguments, "--output_dir", out]
        if data:
            arguments += ["--train_data" if self.mode == "retriever" else "--train_file", data]
        try:
            if self.mode == "retriever":
                args = train_dense.parse_args(train_dense.__doc__, arguments)
            else:
                args = train_epoch.parse_args(arguments)
        except SystemExit as error:  # argparse has printed why, or the help
            if not error.code:
                raise
            raise InputError(f"{self.script.__name__}.py does not take these flags: "
                             f"{' '.join(arguments)}") from None
        if args.plan:
            raise InputError("--plan is not offered in a federation; leave it out")
        args.resume = args.overwrite = False  # a federation has its own state
        return args

    def open(self, out, own_arguments, world, sets, data=None):
        """The script's Run of these flags; sets: what it reads, of "train" and "dev".

        Raises InputError.
        """
        args = self.parse(out, own_arguments, data)
        self.script.check_args(args, sets)
        set_seed(args.seed)  # weights that no checkpoint has are drawn alike by all parties
        return self.script.set_up(args, world, sets)

    def list_inputs(self, out):
        """Return {path: whether all of it is hashed} of the files that the server measures on."""
        args = self.parse(out, [])
        self.script.check_args(args, ["dev"] if self.measures_on(args) else [])
        return self.script.list_inputs(args)

    def measures_on(self, args):
        """True if the flags name something to measure the model on."""
        if self.mode == "retriever":
            return bool(args.eval_data or args.eval_qrels)
        return args.data_val is not None or args.eval_file is not None

    def describe_measures(self, measures):
        """The measures of script.evaluate in a line's words."""
        if self.mode == "generator":
            return f"dev EM {measures['dev_em']:.2f} ({measures['correct']}/{measures['count']})"
        return " ".join(f"{name} {value:.4f}" for name, value in measures.items()
                        if name != "eval_seconds")


@dataclass
class PartyWorld(World):
    """The World of one party among several in a process: its name stands before its lines."""
    party: str = ""

    def log(self, text):
        super().log(f"{self.party}: {text}")


def trained_parameters(run):
    """{name: parameter} of the weights that are trained: what travels."""
    return {name: parameter for name, parameter in run.unwrapped.named_parameters()
            if parameter.requires_grad}


def total_rounds(args):
    """The rounds of each model, over which its learning rate goes up and down."""
    return args.rounds * (args.turns if args.mode == "alternate" else 1)


def name_party(world, party):
    """The World with a party's name before its lines."""
    return PartyWorld(world.rank, world.local_rank, world.size, world.device, party)


def check_mode(mode, chunks):
    """{mode: Task} of federate.py's --mode and the flags behind each `--`. Raises InputError."""
    modes = ["retriever", "generator"] if mode == "alternate" else [mode]
    if len(chunks) != len(modes):
        scripts = {"retriever": "train_dense.py", "generator": "train_epoch.py"}
        wanted = " ".join(f"-- FLAGS OF {scripts[name]}" for name in modes)
        raise InputError(f"--mode {mode} wants the training script's flags behind its own: "
                         f"{wanted}")
    return {name: Task(name, chunk) for name, chunk in zip(modes, chunks)}

