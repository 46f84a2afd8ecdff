"""Flower's strategies by name: how a server combines its clients' weights."""
import inspect
import math

import torch
from flwr.serverapp import strategy as flower

from utils import InputError, refusing

# attributes that a strategy keeps from round to round, apart from the weights
REMEMBERED = ("m_t", "v_t", "momentum_vector", "clipping_norm")
# parameters that are not numbers, or that federate.py sets by flags of its own
FIXED = {"self", "strategy", "fraction_evaluate", "min_evaluate_nodes", "min_available_nodes",
         "min_train_nodes", "evaluate_metrics_aggr_fn", "train_metrics_aggr_fn", "arrayrecord_key",
         "configrecord_key", "train_loss_key", "num_sampled_clients", "accountant", "on_aggregate"}
# Strategies for which --privacy reports an epsilon. Their result is the clients' average, for which
# a privacy wrapper's noise is calibrated. Others scale up what a client changes, or keep it without
# noise; they run too, but without an epsilon.
AVERAGES = {"FedAvg", "FedProx"}
PRIVACY_DELTA = 1e-5


def list_strategies(privacy):
    """Return the names of Flower's strategies for arrays of weights.

    privacy: True for the differential privacy wrappers, False for all others.
    """
    names = []
    for name in flower.__all__:
        kind = getattr(flower, name)
        is_strategy = inspect.isclass(kind) and issubclass(kind, flower.Strategy)
        is_usable = is_strategy and not inspect.isabstract(kind) and "Xgb" not in name
        if is_usable and name.startswith("DifferentialPrivacy") == privacy:
            names.append(name)
    return names


def make_strategy(settings):
    """Return (the strategy, noise multiplier) of --strategy and --privacy.

    The multiplier is 0 without --privacy, and where no epsilon can be computed from it. Raises
    InputError for an unknown name or parameter, and for values that the strategy refuses.
    """
    name, parameters = read_parameters("--strategy", settings.strategy, list_strategies(False))
    if not 0 < parameters.get("fraction_train", 1) <= 1:
        raise InputError(f"--strategy {name}: fraction_train must be > 0 and <= 1, got "
                         f"{parameters['fraction_train']:g}")
    if settings.privacy:
        # the noise is calibrated for an average in which all clients have the same weight
        parameters["weighted_by_key"] = "uniform"
    defaults = {"min_train_nodes": settings.min_clients,
                "min_available_nodes": settings.min_clients, "fraction_evaluate": 0.0}
    with refusing(f"--strategy {name}", "correct its parameters"):
        strategy = getattr(flower, name)(**defaults | parameters)
    return wrap_strategy(strategy, settings) if settings.privacy else (strategy, 0.0)


def wrap_strategy(strategy, settings):
    """Return (the strategy inside the wrapper of --privacy, noise multiplier); see make_strategy.

    Raises InputError.
    """
    if settings.transport == "bf16":
        raise InputError("--privacy clips to a norm that rounding to bfloat16 would change; leave "
                         "out --transport bf16")
    name, parameters = read_parameters("--privacy", settings.privacy, list_strategies(True))
    with refusing(f"--privacy {name}", "correct its parameters"):
        wrapper = getattr(flower, name)(strategy, num_sampled_clients=settings.num_clients,
                                        **parameters)
    is_average = settings.strategy[0] in AVERAGES
    return wrapper, parameters["noise_multiplier"] if is_average else 0.0


def read_parameters(flag, words, names):
    """Return (name, {parameter: value}) of NAME PARAMETER=VALUE ...

    Raises InputError for an unknown name or parameter, a value of another type, and a required
    parameter that is not given.
    """
    name, *settings = words
    if name not in names:
        raise InputError(f"{flag} {name}: unknown, choose from {', '.join(names)}")
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


def read_value(location, text, kind):
    """Return a parameter's value; kind: its annotated type. Raises InputError."""
    if kind is str:
        return text
    with refusing(f"{location}={text}: not a number", f"give one, for example {location}=0.1"):
        value = int(text) if kind is int else float(text)
    if not math.isfinite(value):
        raise InputError(f"{location}={text}: is not finite; give a number")
    return value


# ---------------------------------------------------------------- a strategy's state

def unwrap_strategy(strategy):
    """Return [the strategy, and the strategy that it wraps, if any]."""
    return [strategy, *([strategy.strategy] if hasattr(strategy, "strategy") else [])]


def strategy_state(strategy):
    """Return what the next round depends on: {attribute: number or tensors} of each strategy."""
    states = []
    for layer in unwrap_strategy(strategy):
        state = {}
        for name in REMEMBERED:
            if getattr(layer, name, None) is not None:
                state[name] = map_arrays(getattr(layer, name), torch.as_tensor)
        states.append(state)
    return states


def restore_strategy(strategy, states):
    """Set what strategy_state returned. Raises ValueError for anything else."""
    layers = unwrap_strategy(strategy)
    if len(states) != len(layers):
        raise ValueError(f"it has the states of {len(states)} strategies, not of {len(layers)}")
    for layer, state in zip(layers, states):
        for name, value in state.items():
            is_number = isinstance(value, float) and math.isfinite(value)
            if name not in REMEMBERED or is_number != (name == "clipping_norm"):
                raise ValueError(f"it holds {name}")
            setattr(layer, name, map_arrays(value, lambda tensor: tensor.numpy()))


def map_arrays(value, function):
    """Apply a function to each array in a dict or a list; return a number as it is."""
    if isinstance(value, dict):
        return {name: function(array) for name, array in value.items()}
    if isinstance(value, list):
        return [function(array) for array in value]
    return value


# ---------------------------------------------------------------- privacy

def count_replies(strategy, count):
    """Set how many clients a privacy wrapper averages over: its noise depends on the number."""
    if hasattr(strategy, "num_sampled_clients"):
        strategy.num_sampled_clients = count


def epsilon(noise_multiplier, rounds, delta=PRIVACY_DELTA):
    """Return the epsilon of `rounds` Gaussian releases, if every client contributes to each.

    By Renyi differential privacy (Mironov, arXiv 1702.07476): the releases cost alpha * rounds / (2
    * noise_multiplier^2) at any order alpha (corollary 3); the result converts this to (epsilon,
    delta) at the best order (proposition 3). Infinite without noise.
    """
    if not noise_multiplier:
        return math.inf
    cost = rounds / (2 * noise_multiplier ** 2)
    return cost + 2 * math.sqrt(cost * math.log(1 / delta))
