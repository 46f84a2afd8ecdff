"""What a retriever trains on: which examples of each dataset, with which loss, and which of their
keys.

    dataset             an example needs             a visit's group of keys
    Target.POSITIVES    a positive and negatives     a positive, then negatives
    Target.TEACHER      teacher scores               a positive, then negatives; without positives,
                                                     any of its keys
    Target.GRADED       labels                       any of its keys
"""
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import numpy as np

from dense.examples import (
    MAKE_POSITIVES,
    MAKE_SCORES,
    Source,
    graded_examples,
    qrels_examples,
    read_examples,
    read_outlines,
)
from records.qrels import merge_qrels
from utils import InputError

# what LLM-Embedder sets for each task (its TASK_CONFIG), used with --use_train_config
TRAIN_CONFIG = {
    "qa": {"contrastive_weight": 0, "stable_distill": True},
    "convsearch": {"distill_weight": 0},
    "tool": {"distill_weight": 0},
    "icl": {"select_positive": "random", "contrastive_weight": 0, "stable_distill": True},
    "chat": {"select_positive": "teacher", "contrastive_weight": 0, "teacher_temperature": 0.1},
    "lrlm": {"select_positive": "teacher", "contrastive_weight": 0, "teacher_temperature": 0.1,
             "teacher_scores_margin": 0.1, "max_sample_num": 10000},
}
# LLM-Embedder's values for the flags that a task does not set
TRAIN_CONFIG_DEFAULTS = {"select_positive": "first", "select_negative": "random",
                         "stable_distill": False, "teacher_scores_margin": None,
                         "teacher_scores_min": None, "max_sample_num": None}
NO_POSITIVE = "none"  # select_positive of groups without a positive


@dataclass(frozen=True)
class TaskSettings:
    """Hold the flags of train_dense.py that LLM-Embedder sets by task, and --loss."""
    loss: str | None = None
    contrastive_weight: float = 0.2
    distill_weight: float = 1.0
    teacher_temperature: float = 1.0
    student_temperature: float | None = None
    stable_distill: bool = False
    select_positive: str = "first"
    select_negative: str = "random"
    teacher_scores_margin: float | None = None
    teacher_scores_min: float | None = None
    max_sample_num: int | None = None

    @property
    def only_distills(self):
        """Return whether --loss names a distillation, so that no positives are needed."""
        return self.loss in ("kl", "fid-kd", "emdr2")

    @property
    def distills(self):
        """Return whether distillation is part of the loss."""
        return self.only_distills or not self.loss and self.distill_weight > 0

    @property
    def contrasts(self):
        """Return whether InfoNCE is part of the loss."""
        return self.loss == "infonce" or not self.loss and self.contrastive_weight > 0


@dataclass(frozen=True)
class DataSettings:
    """Hold the flags of train_dense.py that name the data and choose what is trained on."""
    train_data: list = ()
    positives: list = ()
    negatives: list = ()
    graded: list = ()
    key_template: str = "{title} {text}"
    reader_scores: bool = False
    train_group_size: int = 8
    inbatch_same_dataset: str | None = None
    use_train_config: bool = False
    ranker: bool = False
    seed: int = 42

    @property
    def qrels(self):
        """Return the qrels of the flags, for messages."""
        return " ".join([*self.graded, *self.positives, *self.negatives])


class Target(Enum):
    """Name the target of training on a dataset."""
    POSITIVES = "InfoNCE, alone or with distillation"
    TEACHER = "distillation alone: --loss kl, fid-kd or emdr2"
    GRADED = "the labels of --graded"


class GroupRule(NamedTuple):
    """Hold how the group of a visit is chosen, see choose_group."""
    group_size: int
    select_positive: str
    select_negative: str
    stable: bool


class TrainingExamples:
    """Hold the examples to train on, dataset after dataset, as a sequence."""

    def __init__(self):
        self.datasets = []  # (examples, the indices of those to train on)
        self.ends = []      # how many examples there are up to the end of each dataset
        self.instructions = Counter()  # {a record's own instruction, or None: its examples}

    def add(self, examples, indices, kept):
        """Add the examples of a dataset at these indices; kept: their Outlines."""
        self.datasets.append((examples, np.array(indices)))
        self.ends.append(len(self) + len(indices))
        self.instructions.update(outline.instruction for outline in kept)

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index):
        """Return an Example."""
        index = range(len(self))[index]  # raises IndexError
        number = bisect_right(self.ends, index)
        examples, indices = self.datasets[number]
        return examples[indices[index - self.ends[number]]]  # counted from the dataset's end

    def outlines(self):
        """Yield the Outline of each example."""
        for examples, indices in self.datasets:
            outlines = list(read_outlines(examples))
            for index in indices:
                yield outlines[index]


class TrainingData(NamedTuple):
    """Hold all examples, dataset after dataset, and the settings of their training."""
    examples: TrainingExamples
    group_rules: list     # a GroupRule per example
    dataset_sizes: list   # the number of examples of each dataset
    task_settings: dict   # {task: the TaskSettings of its loss}


def no_training_data():
    """Return TrainingData without datasets."""
    return TrainingData(TrainingExamples(), [], [], {})


# ---------------------------------------------------------------- datasets

def read_training(data, task_settings, corpus, queries, log):
    """Return the TrainingData of a DataSettings and the flags' TaskSettings; log what is dropped.

    Raises InputError if a dataset has nothing to train on.
    """
    datasets = []
    for name, examples in read_datasets(data, task_settings, corpus, queries, log):
        datasets.append((name, examples, list(read_outlines(examples))))
    tasks = {outlines[0].task for _, _, outlines in datasets if outlines}
    if data.use_train_config and len(tasks) > 1 and data.inbatch_same_dataset is None:
        raise InputError("--use_train_config with several tasks needs --inbatch_same_dataset epoch")

    training = no_training_data()
    for name, examples, outlines in datasets:
        settings = task_settings
        if data.use_train_config:
            settings = use_train_config(settings, outlines[0].task if outlines else "")
        if data.graded and not settings.loss:
            settings = replace(settings, loss="kl")
        target = choose_target(data, settings)
        rule = make_group_rule(data, settings, target)
        indices = list(range(len(outlines)))
        if target is not Target.GRADED:
            indices = choose_examples(outlines, settings, target, rule, not data.ranker, log)
        indices = indices[:settings.max_sample_num]
        kept = [outlines[index] for index in indices]
        check_any_left(name, outlines, kept, settings, target)
        training.examples.add(examples, indices, kept)
        training.group_rules.extend([rule] * len(kept))
        training.dataset_sizes.append(len(kept))
        training.task_settings.update({outline.task: settings for outline in kept})
    return training


def read_datasets(data, task_settings, corpus, queries, log):
    """Return [(name, examples)] of the files of --train_data, or of the qrels as one dataset."""
    if data.train_data:
        source = Source(data.key_template, data.reader_scores, task_settings.only_distills, corpus,
                        queries)
        return [(path, read_examples(path, source, log)) for path in data.train_data]
    if data.graded:
        examples = graded_examples(corpus, queries, merge_qrels(data.graded, data.seed),
                                   data.train_group_size, data.qrels, log)
    else:
        examples = qrels_examples(corpus, queries, merge_qrels(data.positives, data.seed),
                                  merge_qrels(data.negatives, data.seed), data.qrels, log)
    return [(data.qrels, examples)]


def use_train_config(settings, task):
    """Return the TaskSettings with LLM-Embedder's values of a task."""
    return replace(settings, **TRAIN_CONFIG_DEFAULTS | TRAIN_CONFIG.get(task, {}))


def choose_target(data, settings):
    """Return the Target of a dataset."""
    if data.graded:
        return Target.GRADED
    return Target.TEACHER if settings.only_distills else Target.POSITIVES


def make_group_rule(data, settings, target):
    """Return the GroupRule of a dataset."""
    # with qrels of positives only, the other queries' positives are the negatives
    has_negatives = bool(data.train_data or data.negatives or data.graded)
    select_positive = NO_POSITIVE if target is Target.GRADED else settings.select_positive
    return GroupRule(data.train_group_size if has_negatives else 1, select_positive,
                     settings.select_negative, settings.stable_distill)


def check_any_left(name, outlines, kept, settings, target):
    """Raise InputError if no example of a dataset is left, or if distillation finds no scores.

    outlines: of all its examples; kept: of those that are left.
    """
    is_distilled = target is Target.TEACHER or not (settings.loss or settings.contrastive_weight)
    if is_distilled and all(outline.best is None for outline in kept or outlines):
        raise InputError(f"{name}: no record has teacher scores; {MAKE_SCORES}; without them "
                         "only InfoNCE can be trained: give --loss infonce")
    if not kept and not any(outline.num_pos or outline.best is not None for outline in outlines):
        raise InputError(f"{name}: no record has a positive ('pos', 'positive_ctxs', or "
                         f"'history' with teacher_scores); {MAKE_POSITIVES}")
    if not kept:
        raise InputError(f"{name}: no example is left to train on")


# ---------------------------------------------------------------- examples that are kept

def choose_examples(outlines, settings, target, rule, has_others, log):
    """Return the indices of a dataset's examples that can be trained on; log why others are
    dropped.

    has_others: whether the model compares a query with other queries' keys, as a retriever does and
    a ranker does not. InfoNCE then needs no hard negatives (DPR, section 3.2).
    """
    kept, dropped = [], {}
    for index, outline in enumerate(outlines):
        reason = find_flaw(outline, settings, target, rule, settings.contrasts and has_others)
        if reason is None:
            kept.append(index)
        else:
            count, first_location = dropped.get(reason, (0, outline.location))
            dropped[reason] = (count + 1, first_location)
    for reason, (count, first_location) in dropped.items():
        log(f"{count} records dropped: {reason}, first {first_location}")
    lone = [outlines[index] for index in kept
            if outlines[index].num_pos and not outlines[index].num_neg]
    if lone and rule.group_size > 1:
        log(f"note: records without negatives: {len(lone)} of {len(kept)}, first "
            f"{lone[0].location}; other questions' passages are their negatives")
    return kept


def find_flaw(outline, settings, target, rule, needs_no_negatives=False):
    """Return why an example cannot be trained on, or None if it can, by LLM-Embedder's rules."""
    has_scores = outline.best is not None
    if target is Target.TEACHER and is_unlabelled(outline.num_pos, rule.select_positive):
        if not has_scores:
            return "no teacher scores"
        if outline.num_neg < rule.group_size:
            return "fewer scored keys than --train_group_size"
    else:
        # a negative with the highest score may become the positive
        may_swap = rule.select_positive == "teacher" and has_scores and outline.num_neg > 0
        if not outline.num_pos and not may_swap:
            return "no positive"
        swaps = may_swap and outline.best >= outline.num_pos
        needed = 2 if swaps else 1
        if rule.group_size > 1 and not needs_no_negatives and outline.num_neg < needed:
            return "no negative"
    least, margin = settings.teacher_scores_min, settings.teacher_scores_margin
    if has_scores and least is not None and outline.highest < least:
        return "highest teacher score below --teacher_scores_min"
    if has_scores and margin is not None and outline.highest - outline.lowest < margin:
        return "teacher scores closer than --teacher_scores_margin"
    return None


def is_unlabelled(num_pos, select_positive):
    """Return whether no key of an example is a positive or may become one by its score."""
    return num_pos == 0 and select_positive != "teacher"


# ---------------------------------------------------------------- the group of one visit

def choose_group(example, rule, rng):
    """Return (keys, their scores or None) of one visit: a positive and group_size - 1 negatives, by
    LLM-Embedder's rules. Without a positive, choose all keys like negatives.

    select_positive   first or random of pos; teacher: the highest score of all keys; teacher-pos:
                      the highest of pos; none: no positive
    select_negative   first, random, teacher+ (highest scores) or teacher- (lowest); if there are
                      too few, they are repeated
    stable            sort the negatives by falling score, as stabilized distillation expects them
    """
    keys = example.pos + example.neg
    scores = example.scores
    if is_unlabelled(len(example.pos), rule.select_positive):
        group = []
        candidates = list(range(len(keys)))
    else:
        positive = choose_positive(example, rule.select_positive, rng)
        group = [positive]
        candidates = [index for index in range(len(example.pos), len(keys)) if index != positive]
    negatives = choose_negatives(candidates, scores, rule.group_size - len(group),
                                 rule.select_negative, rng)
    if rule.stable and scores is not None:
        negatives.sort(key=lambda index: scores[index], reverse=True)
    group += negatives
    is_lone = len(group) == 1 < rule.group_size  # without negatives there is nothing to distil
    group_scores = None if scores is None or is_lone else [scores[index] for index in group]
    return [keys[index] for index in group], group_scores


def choose_positive(example, select_positive, rng):
    """Return the index of a visit's positive among pos + neg."""
    if select_positive == "random":
        return rng.randrange(len(example.pos))
    if select_positive == "first" or example.scores is None:
        return 0
    count = len(example.pos) if select_positive == "teacher-pos" else len(example.scores)
    return max(range(count), key=lambda index: example.scores[index])


def choose_negatives(candidates, scores, count, select_negative, rng):
    """Return `count` of the candidates, which are indices of keys. If there are too few, they are
    repeated evenly.
    """
    if not candidates:
        return []
    if len(candidates) < count:
        candidates = candidates * math.ceil(count / len(candidates))
    if select_negative in ("teacher+", "teacher-") and scores is not None:
        candidates = sorted(candidates, key=lambda index: scores[index],
                            reverse=select_negative == "teacher+")
    elif select_negative != "first":
        rng.shuffle(candidates)
    return candidates[:count]
