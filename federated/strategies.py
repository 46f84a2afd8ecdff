"""Flower's strategies by their names: what a server makes of its clients' weights."""
import inspect
import math

import torch
from flwr.serverapp import strategy as flower

from utils import InputError, refusing

# what the strategies remember from round to round, apart from the weights
REMEMBERED = ("m_t", "v_t", "momentum_vector", "clipping_norm")
# parameters that federate.py sets by flags of its own, or that are no numbers
FIXED = {"self", "strategy", "fraction_evaluate", "min_evaluate_nodes", "min_available_nodes",
         "min_train_nodes", "evaluate_metrics_aggr_fn", "train_metrics_aggr_fn", "arrayrecord_key",
         "configrecord_key", "train_loss_key", "num_sampled_clients", "accountant", "on_aggregate"}
# strategies that load the clients' average itself: a wrapper's noise is made for that one. Others
# multiply what a client changes, or remember it without noise.
AVERAGES = {"FedAvg", "FedProx"}
PRIVACY_DELTA = 1e-5


def list_strategies(privacy):
    """The names of Flower's strategies for arrays of weights: the differential privacy wrappers, or
    all others.
    """
    names = []
    for name in flower.__all__:
        kind = getattr(flower, name)
        is_strategy = inspect.isclass(kind) and issubclass(kind, flower.Strategy)
        is_usable = is_strategy and not inspect.isabstract(kind) and "Xgb" not in name
        if is_usable and name.startswith("DifferentialPrivacy") == privacy:
            names.append(name)
    return names


def make_strategy(args):
    """(the strategy of --strategy, inside that of --privacy if there is one; the latter's noise
    multiplier, 0 where none bounds what the model tells).

    Raises InputError for an unknown name or parameter, and for what the strategy itself refuses.
    """
    name, parameters = read_parameters("--strategy", args.strategy, list_strategies(False))
    if not 0 < parameters.get("fraction_train", 1) <= 1:
        raise InputError(f"--strategy {name} fraction_train={parameters['fraction_train']:g}: is "
                         "no part of the clients; give one above 0, at most 1")
    if args.privacy:
        # the noise is made for an average in which all clients weigh the same
        parameters["weighted_by_key"] = "uniform"
    defaults = {"min_train_nodes": args.min_clients, "min_available_nodes": args.min_clients,
                "fraction_evaluate": 0.0}
    with refusing(f"--strategy {name}", "mend its parameters"):
        strategy = getattr(flower, name)(**defaults | parameters)
    return wrap_strategy(args, strategy) if args.privacy else (strategy, 0.0)


def wrap_strategy(args, strategy):
    """(the strategy inside the differential privacy wrapper of --privacy, its noise multiplier or,
    around a strategy that is no average, 0).

    Raises InputError.
    """
    if args.transport == "bf16":
        raise InputError("--privacy clips to a norm that rounding to bfloat16 would change; leave "
                         "out --transport bf16")
    name, parameters = read_parameters("--privacy", args.privacy, list_strategies(True))
    with refusing(f"--privacy {name}", "mend its parameters"):
        wrapper = getattr(flower, name)(strategy, num_sampled_clients=args.num_clients,
                                        **parameters)
    return wrapper, parameters["noise_multiplier"] if args.strategy[0] in AVERAGES else 0.0


def read_parameters(flag, words, names):
    """(name, {parameter: value}) of NAME PARAMETER=VALUE ...

    Raises InputError for a name or parameter that there is not, for a value of another type, and
    for one that is needed and not given.
    """
    name, *settings = words
    if name not in names:
        raise InputError(f"{flag} {name}: unknown, choose of {', '.join(names)}")
    known = {key: parameter for key, parameter
             in inspect.signature(getattr(flower, name)).parameters.items() if key not in FIXED}
    values = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in known:
            raise InputError(f"{flag} {name} has no parameter {key}; it has {', '.join(known)}")
        values[key] = read_value(f"{flag} {name} {key}", text, known[key].annotation)
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in values:
            raise InputError(f"{flag} {name} needs {key}: {flag} {name} {key}=NUMBER")
    return name, values


def read_value(place, text, kind):
    """The value of a parameter that is annotated with this type. Raises InputError."""
    if kind is str:
        return text
    with refusing(f"{place}={text}: is no number", f"give one, {place}=0.1"):
        value = int(text) if kind is int else float(text)
    if not math.isfinite(value):
        raise InputError(f"{place}={text}: is not finite; give a number")
    return value


# ---------------------------------------------------------------- what a strategy remembers

def layers_of(strategy):
    """The strategy, and the one that it wraps."""
    return [strategy, *([strategy.strategy] if hasattr(strategy, "strategy") else [])]


def remembered(strategy):
    """[{attribute: numbers or tensors}] of each layer: what the next round depends on."""
    states = []
    for layer in layers_of(strategy):
        state = {}
        for name in REMEMBERED:
            if getattr(layer, name, None) is not None:
                state[name] = map_arrays(getattr(layer, name), torch.as_tensor)
        states.append(state)
    return states


def recall(strategy, states):
    """Sets what `remembered` returned. Raises ValueError for anything else."""
    layers = layers_of(strategy)
    if len(states) != len(layers):
        raise ValueError(f"it is of {len(states)} strategies, not of {len(layers)}")
    for layer, state in zip(layers, states):
        for name, value in state.items():
            is_number = isinstance(value, float) and math.isfinite(value)
            if name not in REMEMBERED or is_number != (name == "clipping_norm"):
                raise ValueError(f"it holds {name}")
            setattr(layer, name, map_arrays(value, lambda tensor: tensor.numpy()))


def map_arrays(value, function):
    """The function of each array in a dict or a list; a number stays as it is."""
    if isinstance(value, dict):
        return {name: function(array) for name, array in value.items()}
    if isinstance(value, list):
        return [function(array) for array in value]
    return value


# ---------------------------------------------------------------- privacy

def count_replies(strategy, count):
    """Tells a privacy wrapper how many clients its average is of: the noise depends on it."""
    if hasattr(strategy, "num_sampled_clients"):
        strategy.num_sampled_clients = count


def epsilon(noise_multiplier, rounds, delta=PRIVACY_DELTA):
    """The epsilon, at this delta, of so many Gaussian releases to which every client contributes.

    By Renyi differential privacy (Mironov, arXiv 1702.07476): the releases' is
    alpha * rounds / (2 * noise_multiplier^2) at any order alpha (corollary 3), and the best order
    of its conversion (proposition 3) gives this. Infinite without noise.
    """
    if not noise_multiplier:
        return math.inf
    cost = rounds / (2 * noise_multiplier ** 2)
    return cost + 2 * math.sqrt(cost * math.log(1 / delta))
