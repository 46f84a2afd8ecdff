"""Simulations by federate.py as a user runs them, and its parts with clients that tests make up."""
import argparse
import json
import os
import random
import re
import resource

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.differential_privacy import KEY_NORM_BIT
from safetensors.torch import load_file

import federated.alternation as alternation
import federated.client as client_side
from conftest import WORDS, make_bert, make_records, run, run_and_kill, start_server
from federated.server import Server, aggregate, ask_clients, check_answer, make_messages
from federated.simulation import LocalGrid
from federated.split import split_file
from federated.strategies import epsilon, list_strategies, make_strategy
from federated.task import trained_parameters
from federated.transport import digest_frozen, from_wire, to_wire
from training.loop import Progress
from training.resume import write_state
from utils import InputError, World

# one thread, no dropout: what is compared to the last bit
RETRIEVER = ["--lr", "1e-3", "--warmup_ratio", "0", "--query_max_length", "16", "--key_max_length",
             "24", "--group_size", "2", "--batch_size", "4", "--clip", "1e9"]
READER = ["--lr", "1e-3", "--num_warmup_steps", "0", "--dropout", "0", "--num_contexts", "2",
          "--max_length", "40", "--batch_size", "4", "--clip", "1e9"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0,
                     attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a.json (5 records), b.json (8), both.json, a corpus and dev questions
    for a retriever, and reader-a.json (3), reader-b.json (8) for a reader.
    """
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))
    documents = [text(rng.randint(5, 15)) for _ in range(30)]
    rows = [{"query": " ".join(rng.sample(documents[i].split(), 4)), "pos": [documents[i]],
             "neg": rng.sample(documents[13:], 3), "pos_index": [i], "topic": f"t{i % 3}",
             "answers": ["baker"]}
            for i in range(13)]
    corpus = [{"_id": f"d{i}", "title": "", "text": key} for i, key in enumerate(documents)]
    reading = make_records(11)
    parts = {"a": rows[:5], "b": rows[5:], "both": rows, "corpus": corpus, "reader-a": reading[:3],
             "reader-b": reading[3:], "reader": reading}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def clients(files, *names):
    return [word for name in names for word in ("--client",
                                                f"name={name} data={files}/{name}.json")]


def federate(out, *own, mode="retriever", flags=(), **more):
    """Return (stdout, stderr) of a simulation with the retriever's or reader's flags."""
    defaults = {"retriever": RETRIEVER, "generator": READER}[mode]
    return run("federate.py", out, "--mode", mode, *own, "--", *defaults, *flags, **more)


def state(out):
    return torch.load(f"{out}.state", weights_only=True)


def weights(out):
    return state(out)["weights"]


def rows(out):
    return [json.loads(line) for line in open(f"{out}.jsonl")]


def measured(files):
    return ["--corpus", files / "corpus.json", "--eval_data", files / "both.json", "--metrics",
            "recall", "--cutoffs", "1", "5"]


# ---------------------------------------------------------------- what a round computes

def test_a_round_is_the_weighted_average_of_the_clients_results(bert, files, tmp_path):
    base = ["--rounds", "1", "--local_epochs", "2"]
    flags = ["--query_encoder", bert]
    for name in ("a", "b"):
        federate(tmp_path / name, *base, *clients(files, name), flags=flags)
    federate(tmp_path / "both", *base, *clients(files, "b", "a"), flags=flags)
    a, b, both = (weights(tmp_path / name) for name in ("a", "b", "both"))
    assert rows(tmp_path / "both")[1]["clients"]["a"]["num-examples"] == 10
    for name, average in both.items():
        by_hand = (5 * a[name].double() + 8 * b[name].double()) / 13
        torch.testing.assert_close(average.double(), by_hand, atol=1e-6, rtol=1e-6)
    assert any((a[name] - b[name]).abs().max() > 1e-3 for name in both)


@pytest.mark.parametrize("mode", ["retriever", "generator"])
def test_one_client_in_one_round_is_the_training_script(bert, tiny, files, tmp_path, mode):
    if mode == "retriever":
        flags, name = ["--query_encoder", bert], "both"
        run("train_dense.py", "--output_dir", tmp_path / "script", "--epochs", "2", *RETRIEVER,
            *flags, "--train_data", files / "both.json")
    else:
        flags, name = ["--t5_name", tiny, "--eval_file", files / "reader-a.json"], "reader"
        run("train_epoch.py", "--output_dir", tmp_path / "script", "--epochs", "2", *READER, *flags,
            "--train_file", files / "reader.json")
    federate(tmp_path / "federated", "--rounds", "1", "--local_epochs", "2",
             *clients(files, name), mode=mode, flags=flags)
    expected = state(tmp_path / "script")["model"]
    for weight, tensor in weights(tmp_path / "federated").items():
        assert torch.equal(tensor, expected[weight]), weight


def test_two_clients_sgd_step_is_a_central_step_on_the_joint_batch(tiny, files, tmp_path):
    """Weight the clients by target tokens, because the loss is a mean over them."""
    import train_epoch as script
    flags = ["--t5_name", tiny, "--batch_size", "8", "--weight_decay", "0"]
    federate(tmp_path / "two", "--rounds", "1", "--local_optimizer", "sgd", "--strategy", "FedAvg",
             "weighted_by_key=num-targets", *clients(files, "reader-a", "reader-b"),
             mode="generator", flags=flags)
    args = script.parse_args([str(tmp_path / "m"), str(files / "reader.json"),
                              str(files / "reader.json"), *READER, "--t5_name", tiny,
                              "--batch_size", "11"])
    script.check_args(args)
    central = script.set_up(args, script.start_processes(""))
    start = {name: weight.detach().clone() for name, weight
             in central.unwrapped.named_parameters()}
    central.optimizer = torch.optim.SGD(central.model.parameters(), lr=1e-3)
    _, batches = script.open_epoch(central, script.plan_run(central, 0))
    script.train_update(central, batches, 1)
    federated = weights(tmp_path / "two")
    for name, weight in central.unwrapped.named_parameters():
        torch.testing.assert_close(federated[name], weight.detach(), atol=1e-7, rtol=1e-5)
    assert max((start[name] - federated[name]).abs().max() for name in start) > 1e-4


def test_fedprox(bert, files, tmp_path):
    """Check that mu 0 equals FedAvg, and that a large mu keeps clients near the global weights."""
    base = ["--rounds", "2", *clients(files, "a", "b")]
    flags = ["--query_encoder", bert]
    for name, strategy in {"avg": ["FedAvg"], "prox0": ["FedProx", "proximal_mu=0"],
                           "prox": ["FedProx", "proximal_mu=100"]}.items():
        federate(tmp_path / name, *base, "--local_optimizer", "sgd", "--strategy", *strategy,
                 flags=flags)
    start = load_file(os.path.join(bert, "model.safetensors"))

    def distance(out):
        return sum((tensor - start[name.split(".model.")[-1]]).square().sum()
                   for name, tensor in weights(out).items())
    average, zero = weights(tmp_path / "avg"), weights(tmp_path / "prox0")
    assert all(torch.equal(average[name], zero[name]) for name in average)
    assert distance(tmp_path / "prox") < 0.99 * distance(tmp_path / "avg")


def test_rounds_are_parts_of_one_schedule(bert, files, tmp_path):
    """Check that three rounds of 5 updates equal one of 15, across the ends of epochs of 4 and with
    warm-up. SGD has no state that a new round would reset.
    """
    flags = ["--query_encoder", bert, "--batch_size", "2", "--warmup_ratio", "0.2",
             "--grad_accumulation", "2", "--lr", "0.1"]
    for name, rounds, updates in (("one", "1", "15"), ("three", "3", "5")):
        federate(tmp_path / name, *clients(files, "both"), "--rounds", rounds, "--local_updates",
                 updates, "--local_optimizer", "sgd", flags=flags)
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_bf16_transport_halves_the_bytes_and_keeps_small_updates(bert, files, tmp_path):
    base = ["--rounds", "3", *clients(files, "a", "b")]
    flags = ["--query_encoder", bert, "--lr", "1e-5"]
    federate(tmp_path / "float32", *base, flags=flags)
    federate(tmp_path / "bf16", *base, "--transport", "bf16", flags=flags)
    whole, half = weights(tmp_path / "float32"), weights(tmp_path / "bf16")
    start = load_file(os.path.join(bert, "model.safetensors"))
    updates = [whole[name] - start[name.split(".model.")[-1]] for name in whole]
    differences = [half[name] - whole[name] for name in whole]
    norms = [sum(tensor.square().sum() for tensor in tensors) ** 0.5
             for tensors in (differences, updates)]
    assert norms[0] < 0.5 * norms[1]
    # of most weights, the update is smaller than what bfloat16 can tell apart
    assert sum((whole[name].bfloat16() == start[name.split(".model.")[-1]].bfloat16()).sum()
               for name in whole) > 0.5 * sum(tensor.numel() for tensor in whole.values())
    ratio = rows(tmp_path / "bf16")[1]["bytes_up"] / rows(tmp_path / "float32")[1]["bytes_up"]
    assert ratio < 0.51


def test_a_client_of_two_processes_is_one_of_twice_the_batch(bert, files, tmp_path):
    base = ["--rounds", "1", "--local_optimizer", "sgd", "--client"]
    flags = ["--query_encoder", bert, "--lr", "0.1"]
    federate(tmp_path / "one", *base, f"name=a data={files}/both.json", flags=[*flags,
             "--batch_size", "8"])
    federate(tmp_path / "two", *base, f"name=a data={files}/both.json processes=2", flags=flags)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)
    assert os.listdir(tmp_path / "two.clients") == []


@pytest.fixture
def opened(bert, tmp_path, monkeypatch):
    """Return a function that opens the Run of a client with these settings, in this process."""
    import federate as script
    monkeypatch.setattr(client_side, "RUNS", {})
    monkeypatch.setattr(client_side, "SHARED_MODELS", {})
    args = script.parse_command_line([str(tmp_path / "out"), "--mode", "retriever", "--",
                                      *RETRIEVER, "--query_encoder", bert])
    task, settings = script.make_tasks(args)["retriever"], script.make_settings(args)

    def open_client(**values):
        return client_side.open_run(task, settings, client_side.read_client(values))
    return open_client


def test_only_clients_of_the_same_flags_share_a_model(opened, files):
    """Compare flags and not only shapes of weights: here the pooling differs."""
    data = f"{files}/a.json"
    a, b = opened(name="a", data=data), opened(name="b", data=data)
    first = opened(name="first", data=data, flags="--pooling_method cls")
    assert a.model is b.model and first.model is not a.model
    assert [run.model.query_encoder.pooling for run in (a, first)] == ["mean", "cls"]


def test_a_refused_update_leaves_no_gradient_behind(bert, files, tmp_path, monkeypatch):
    """Check that a client's refused gradient is not added to the gradient of another client."""
    import federate as script
    monkeypatch.setattr(client_side, "RUNS", {})
    monkeypatch.setattr(client_side, "SHARED_MODELS", {})
    arguments = ["out", "--mode", "retriever", "--", *RETRIEVER, "--query_encoder", bert]
    settings = [{"name": name, "data": f"{files}/a.json"} for name in ("a", "b")]
    grid = LocalGrid(script.make_client_app(), settings, {"flags": " ".join(arguments)})
    args = script.parse_command_line(arguments)
    run = client_side.open_run(script.make_tasks(args)["retriever"], script.make_settings(args),
                               client_side.read_client(settings[0]))
    start = {name: weight.detach().clone() for name, weight in trained_parameters(run).items()}

    def ask_both(factor):
        weights = {name: weight * factor for name, weight in start.items()}
        arrays, layout = to_wire(weights)
        config = {"mode": "retriever", "round": 1, "rounds": 1, "layout": layout,
                  "frozen": digest_frozen(run)}
        return grid.send_and_receive([
            Message(RecordDict({"arrays": arrays, "config": ConfigRecord(config)}),
                    dst_node_id=node, message_type="train") for node in (1, 2)])
    before = ask_both(1)
    assert not any(reply.has_error() for reply in before)
    assert all(reply.has_error() for reply in ask_both(1e30))
    for reply, same in zip(ask_both(1), before):
        assert not reply.has_error()
        weights, expected = (from_wire(answer.content["arrays"], answer.content["config"]["layout"])
                             for answer in (reply, same))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- what travels

@pytest.mark.parametrize("flags", [["--freeze", "embeddings"], ["--lora", "2"]])
def test_only_what_is_trained_travels(bert, files, tmp_path, flags):
    out = tmp_path / "out"
    federate(out, "--rounds", "1", *clients(files, "a", "b"),
             flags=["--query_encoder", bert, *flags])
    sent = weights(out)
    kind = "lora_" if "--lora" in flags else "layer"
    assert sent and all(kind in name for name in sent)
    before, after = load_file(os.path.join(bert, "model.safetensors")), load_file(
        out / "model.safetensors")
    is_frozen = {name: torch.equal(before[name], after[name]) for name in after}
    assert is_frozen["embeddings.word_embeddings.weight"]
    assert not is_frozen["encoder.layer.0.attention.self.query.weight"]
    size = sum(4 * tensor.numel() for tensor in sent.values())
    assert size < rows(out)[1]["bytes_down"] / 2 < 1.5 * size + 200 * len(sent)


def test_the_best_model_opens_everywhere(bert, tiny, files, tmp_path):
    federate(tmp_path / "retriever", "--rounds", "2", *clients(files, "a", "b"),
             flags=["--query_encoder", bert, *measured(files)])
    found, _ = run("retrieve.py", "--query_encoder", tmp_path / "retriever", "--corpus",
                   files / "corpus.json", "--eval_data", files / "both.json", "--metrics", "recall",
                   "--cutoffs", "1", "5", "--index", tmp_path / "index")
    best = max(rows(tmp_path / "retriever"), key=lambda row: row["recall@5"])["recall@5"]
    assert f"{best:.4f}" in found or f"{100 * best:.2f}" in found
    federate(tmp_path / "reader", "--rounds", "1", *clients(files, "reader-a", "reader-b"),
             mode="generator", flags=["--t5_name", tiny, "--eval_file", files / "reader.json"])
    run("test.py", tmp_path / "reader", files / "reader.json")
    info = json.loads((tmp_path / "reader" / "args.json").read_text())
    assert info["num_contexts"] == 2 and info["dev_em"] is not None


def test_what_a_record_holds_is_not_told_to_the_server(bert, files, tmp_path):
    """Check that the server learns only that a client failed: its error may quote records."""
    import federate as script
    secret = tmp_path / "secret.json"
    secret.write_text('{"query": "Mrs Smith of ward 7", "pos": [5]}\n')
    flags = ["out", "--mode", "retriever", "--", *RETRIEVER, "--query_encoder", bert]
    grid = LocalGrid(script.make_client_app(), [{"name": "clinic", "data": str(secret)}],
                     {"flags": " ".join(flags)})
    arrays, layout = to_wire({"w": torch.zeros(1)})
    config = ConfigRecord({"mode": "retriever", "round": 1, "rounds": 1, "frozen": "",
                           "layout": layout})
    message = Message(RecordDict({"arrays": arrays, "config": config}), dst_node_id=1,
                      message_type="train")
    [reply] = grid.send_and_receive([message])
    assert reply.error.reason == (
        "clinic: cannot train on its records; see the error in its own output")


# ---------------------------------------------------------------- faults

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))


class StubRun:
    """Hold the parts of a Run that the server's rounds use."""
    def __init__(self):
        self.unwrapped, self.progress = Model(), Progress()
        self.world = World(0, 0, 1, torch.device("cpu"))
        self.args = argparse.Namespace(seed=1)


class StubTask:
    mode = "retriever"


def reply_with(weight, **more):
    """Return a client's function whose answer has this weight."""
    def act(message):
        metrics = {"num-examples": 2, "train_loss": 0.5, "uniform": 1} | more.get("metrics", {})
        arrays, layout = to_wire({more.get("name", "weight"): torch.as_tensor(weight)})
        config = ConfigRecord({"name": f"client{message.metadata.dst_node_id}", "layout": layout})
        return Message(RecordDict({"arrays": more.get("arrays", arrays), "config": config,
                                   "metrics": MetricRecord(metrics)}), reply_to=message)
    return act


def without_loss(message):
    reply = reply_with(ONES)(message)
    del reply.content["metrics"]["train_loss"]
    return reply


def make_server(actions, *own):
    """Return a Server whose clients run these functions."""
    import federate as script
    args = script.parse_command_line(["out", "--mode", "retriever", "--simulate",
                                      str(len(actions)), "--data", "x", "--rounds", "3", *own,
                                      "--"])
    script.check_command_line(args)
    settings = script.make_settings(args)
    app = ClientApp()

    @app.train()
    def train(message, context):
        return actions[message.metadata.dst_node_id - 1](message)
    grid = LocalGrid(app, [{} for _ in actions], {})
    strategy, noise = make_strategy(settings)
    return Server(settings, StubTask(), StubRun(), strategy, grid, True, noise, vars(args))


def one_round(server, number=1):
    _, replies, left_out = ask_clients(server, f"round {number}",
                                       lambda: make_messages(server, number), check_answer)
    aggregate(server, number, replies)
    return server.run.unwrapped.weight.detach(), left_out


ONES = np.ones((2, 3))
HALF_NAN = np.where(np.eye(2, 3) == 1, np.nan, 1)


@pytest.mark.parametrize("bad,reason", [
    (reply_with(HALF_NAN), "client2: weight is not finite there"),
    (reply_with(np.ones((3, 2))),
     r"client2: weight is \(3, 2\) at client2, \(2, 3\) at the server"),
    (reply_with(ONES, name="other"), "client2: weight is missing at client2"),
    (reply_with(ONES, arrays=ArrayRecord({"weights": Array("float32", (6,), "numpy.ndarray",
                                                           b"short")})),
     "client2: the weights came in a form that cannot be read"),
    (reply_with(ONES, metrics={"train_loss": float("nan")}), "client2: its metrics are not finite"),
    (reply_with(ONES, metrics={"num-examples": 0}), "client2: it has trained on no example"),
    (without_loss, "client2: its answer lacks parts"),
    (lambda message: Message(RecordDict({}), reply_to=message), "node 2: its answer lacks parts"),
])
def test_a_bad_answer_is_left_out_and_named(bad, reason, capsys):
    server = make_server([reply_with(ONES), bad, reply_with(3 * ONES)])
    weight, left_out = one_round(server)
    assert torch.equal(weight, torch.full((2, 3), 2.0))
    assert len(left_out) == 1
    assert re.match(reason, left_out[0]), left_out
    assert "round 1: left out " in capsys.readouterr().out


def test_double_arrays_are_averaged_as_float32():
    doubles = ArrayRecord({"weights": Array(np.ones(6))})
    server = make_server([reply_with(ONES, arrays=doubles)] * 2)
    weight, _ = one_round(server)
    assert torch.equal(weight, torch.ones(2, 3))


def test_a_round_is_tried_again_and_then_ends_with_one_line(capsys):
    calls = []

    def fails_once(message):
        calls.append(1)
        return reply_with(HALF_NAN if len(calls) == 1 else ONES)(message)
    server = make_server([reply_with(ONES), fails_once], "--min_clients", "2")
    weight, left_out = one_round(server)
    assert torch.equal(weight, torch.ones(2, 3)) and left_out == []
    assert "attempt 1 of 2" in capsys.readouterr().out
    server = make_server([reply_with(ONES), reply_with(HALF_NAN)], "--min_clients", "2")
    with pytest.raises(InputError, match="round 1 had 1 of the 2 clients that it needs, in 2 "
                                         "attempts: client2: weight is not finite"):
        one_round(server)


def test_a_client_without_an_answer_is_named():
    server = make_server([reply_with(ONES)] * 3)
    deliver = server.grid.send_and_receive
    server.grid.send_and_receive = lambda messages, timeout: [
        reply for reply in deliver(messages) if reply.metadata.src_node_id != 2]
    _, left_out = one_round(server)
    assert left_out == ["node 2: no answer in 3600 s"]


def test_a_client_that_is_gone_is_not_waited_for_again():
    server = make_server([reply_with(ONES)] * 3, "--min_clients", "2")
    one_round(server)
    server.grid.contexts.pop(3)
    _, left_out = one_round(server, 2)
    assert left_out == []


def test_two_clients_of_one_name_both_count():
    def unnamed(message):
        reply = reply_with(ONES)(message)
        reply.content["config"]["name"] = "clinic"
        return reply
    server = make_server([unnamed, unnamed])
    _, replies, _ = ask_clients(server, "round 1", lambda: make_messages(server, 1),
                                check_answer)
    names = sorted(server.name_sender(reply) for reply in replies)
    assert names[0] == "clinic" and names[1] in ("node 1", "node 2")


def test_clients_that_never_come(capsys):
    server = make_server([reply_with(ONES)] * 2, "--patience", "0.1")
    server.grid.contexts.pop(2)
    with pytest.raises(InputError, match="1 of 2 clients are online after 0.1 s"):
        one_round(server)
    assert "waiting for 2 clients, 1 online" in capsys.readouterr().out


# ---------------------------------------------------------------- strategies

PARAMETERS = {"FedProx": ["proximal_mu=0.1"], "QFedAvg": ["client_learning_rate=0.1"],
              "FedAvgM": ["server_momentum=0.9"], "FedAdam": ["eta=0.01", "tau=1e-3"]}


@pytest.mark.parametrize("name", list_strategies(False))
def test_every_strategy_makes_a_model(name):
    values = [np.full((2, 3), 1 + index / 10) for index in range(8)]
    server = make_server([reply_with(value) for value in values], "--strategy", name,
                         *PARAMETERS.get(name, []))
    for number in (1, 2):
        weight, left_out = one_round(server, number)
        assert weight.dtype == torch.float32 and torch.isfinite(weight).all() and not left_out
    assert weight.abs().sum() > 0


def test_a_robust_strategy_ignores_an_attacker():
    values = [ONES, 1.1 * ONES, 0.9 * ONES, 1e6 * ONES]
    for name, *parameters in (["FedMedian"], ["Krum", "num_malicious_nodes=1"],
                              ["FedTrimmedAvg", "beta=0.3"]):
        server = make_server([reply_with(value) for value in values], "--strategy", name,
                             *parameters)
        weight, _ = one_round(server)
        assert 0.8 < weight.min() and weight.max() < 1.2, name


@pytest.mark.parametrize("name,norm", [
    ("DifferentialPrivacyServerSideFixedClipping", "clipping_norm"),
    ("DifferentialPrivacyServerSideAdaptiveClipping", "initial_clipping_norm")])
def test_privacy_clips_and_weighs_all_clients_alike(name, norm):
    actions = [reply_with(100 * ONES, metrics={"num-examples": 90}), reply_with(0.01 * ONES)]
    server = make_server(actions, "--privacy", name, "noise_multiplier=0", f"{norm}=0.5")
    weight, _ = one_round(server)
    assert weight.norm() == pytest.approx((0.5 + 0.01 * 6 ** 0.5) / 2, rel=1e-4)


@pytest.mark.parametrize("name,norm", [
    ("DifferentialPrivacyClientSideFixedClipping", "clipping_norm"),
    ("DifferentialPrivacyClientSideAdaptiveClipping", "initial_clipping_norm")])
def test_privacy_adds_noise_for_as_many_clients_as_answered(name, norm):
    more = {"metrics": {KEY_NORM_BIT: 0}}
    actions = [reply_with(ONES, **more), reply_with(ONES, **more), reply_with(HALF_NAN, **more)]
    server = make_server(actions, "--min_clients", "2", "--privacy", name, "noise_multiplier=2",
                         f"{norm}=0.5", *([] if "Fixed" in name else ["clipped_count_stddev=2"]))
    fixed = "Fixed" in name
    draws = [one_round(server, number)[0].clone() for number in range(1, 101 if fixed else 2)]
    deviation = torch.stack(draws).std().item()
    if fixed:
        assert deviation == pytest.approx(2 * 0.5 / 2, rel=0.1)
    assert 0 < deviation < 5


def test_privacy_leaves_out_a_client_that_changed_nothing():
    """Leave it out, because Flower would divide by the norm of its update."""
    server = make_server([reply_with(ONES), reply_with(0 * ONES)], "--privacy",
                         "DifferentialPrivacyServerSideFixedClipping", "noise_multiplier=0",
                         "clipping_norm=1")
    _, left_out = one_round(server)
    assert left_out == ["client2: it sent the global weights back, which cannot be clipped"]


def test_epsilon_of_gaussian_releases():
    """Search the best order alpha of rounds * alpha / (2 z^2) + log(1 / delta) / (alpha - 1)."""
    orders = np.linspace(1.001, 200, 2_000_000)
    for noise, rounds in ((1, 1), (4, 30), (0.5, 10)):
        by_search = (rounds * orders / (2 * noise ** 2) + np.log(1e5) / (orders - 1)).min()
        assert epsilon(noise, rounds) == pytest.approx(by_search, rel=1e-4)
    assert epsilon(0, 1) == float("inf")


@pytest.mark.parametrize("name,multiplier", [("FedAvg", 2), ("FedAdam", 0), ("FedMedian", 0)])
def test_epsilon_is_of_averages_alone(name, multiplier):
    """Report none for other strategies: the wrapper's noise is calibrated for an average."""
    server = make_server([reply_with(ONES)] * 2, "--strategy", name, "--privacy",
                         "DifferentialPrivacyServerSideFixedClipping", "noise_multiplier=2",
                         "clipping_norm=1")
    assert server.noise_multiplier == multiplier


def test_who_is_asked_and_the_noise_cannot_be_guessed_in_a_deployed_run():
    draws = []
    for _ in range(2):
        server = make_server([reply_with(ONES)])
        server.simulated = False
        random.seed(1)  # as Task.open does
        np.random.seed(1)
        one_round(server)
        draws.append((random.random(), np.random.random()))
    assert draws[0][0] != draws[1][0] and draws[0][1] != draws[1][1]


# ---------------------------------------------------------------- splits

def test_splits(files, tmp_path):
    given = [json.loads(line) for line in open(files / "both.json")]
    for kind in ("iid", "topic", "dirichlet"):
        paths = split_file(str(files / "both.json"), kind, 3, str(tmp_path / kind), "topic", 1.0, 4)
        again = split_file(str(files / "both.json"), kind, 3, str(tmp_path / "again"), "topic", 1.0,
                           4)
        parts = [[json.loads(line) for line in open(path)] for path in paths]
        assert [open(path).read() for path in paths] == [open(path).read() for path in again]
        assert sorted(row["query"] for part in parts for row in part) == sorted(
            row["query"] for row in given)
        topics = [{row["topic"] for row in part} for part in parts]
        if kind == "topic":
            assert sum(len(own) for own in topics) == 3
        if kind == "iid":
            assert sorted(map(len, parts)) == [4, 4, 5]
    with pytest.raises(InputError, match="client 4 of 4 gets no record by --split topic"):
        split_file(str(files / "both.json"), "topic", 4, str(tmp_path / "x"), "topic", 1.0, 4)
    with pytest.raises(InputError, match="both.json:1: .* 'subject', got None; name the "
                                         "field"):
        split_file(str(files / "both.json"), "topic", 2, str(tmp_path / "x"), "subject", 1.0, 4)


# ---------------------------------------------------------------- resuming

def test_a_killed_server_goes_on_to_the_same_bits(bert, files, tmp_path, monkeypatch):
    """Resume FedAdam's moments, the adapted clipping norm, the noise and the sampling."""
    monkeypatch.chdir(tmp_path)
    own = ["--rounds", "5", "--simulate", "3", "--data", files / "both.json", "--strategy",
           "FedAdam", "eta=0.01", "fraction_train=0.7", "--privacy",
           "DifferentialPrivacyServerSideAdaptiveClipping", "noise_multiplier=1.5",
           "clipped_count_stddev=2"]
    flags = ["--query_encoder", bert, *measured(files), "--best_metric", "recall@5"]
    federate(tmp_path / "whole", *own, "--resume", flags=flags)
    last_change = start_server().changes
    run_and_kill("federate.py", tmp_path / "killed", "--mode", "retriever", *own, "--resume", "--",
                 *RETRIEVER, *flags, at=last_change - 5)  # in one of the last rounds
    stdout, _ = federate(tmp_path / "killed", *own, "--resume", flags=flags)
    assert "resuming after round" in stdout
    whole, killed = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert all(torch.equal(whole["weights"][name], killed["weights"][name])
               for name in whole["weights"])
    timings = {"eval_seconds", "round_seconds", "clients"}

    def plain(row):
        return {key: value for key, value in row.items() if key not in timings}
    assert list(map(plain, rows(tmp_path / "whole"))) == list(map(plain, rows(tmp_path / "killed")))
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "killed" / "model.safetensors").read_bytes()
    _, stderr = federate(tmp_path / "killed", *own, "--resume", "--local_epochs", "3", flags=flags,
                         code=1)
    assert "is from a run with --local_epochs 1 (now 3)" in stderr


def test_a_state_that_cannot_be_of_a_run_is_refused(bert, files, tmp_path):
    own, flags = ["--rounds", "1", *clients(files, "a")], ["--query_encoder", bert]
    federate(tmp_path / "out", *own, flags=flags)
    good = state(tmp_path / "out")
    name = next(iter(good["weights"]))
    for wrong in ({"progress": good["progress"] | {"total_updates": -5}},
                  {"weights": good["weights"] | {name: good["weights"][name] / 0}}):
        torch.save(good | wrong, tmp_path / "out.state")
        _, stderr = federate(tmp_path / "out", *own, "--resume", flags=flags, code=1)
        assert "out.state: it ends after round " in stderr and stderr.count("\n") == 1
    assert any(path.endswith("a.json") for path in good["inputs"])  # A32
    torch.save(good | {"inputs": dict.fromkeys(good["inputs"], "3:0")}, tmp_path / "out.state")
    _, stderr = federate(tmp_path / "out", *own, "--resume", flags=flags, code=1)
    assert "out.state is from a run in which " in stderr and stderr.count("\n") == 1


def test_a_full_disk_is_one_line(tmp_path):
    """Expect one line, where torch raises an error about its archive."""
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, most))
    try:
        with pytest.raises(InputError, match="out.state: cannot be written .*make room"):
            write_state(str(tmp_path / "out.state"), {"weights": torch.zeros(10 ** 6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))
    assert os.listdir(tmp_path) == []


def test_an_overwritten_run_is_not_resumed(bert, files, tmp_path):
    """Check that a run stopped in its first round leaves no state of the run that it replaced."""
    own = ["--rounds", "1", *clients(files, "a")]
    federate(tmp_path / "out", *own, flags=["--query_encoder", bert])
    _, stderr = federate(tmp_path / "out", *own, "--overwrite", code=1,
                         flags=["--query_encoder", bert, "--lr", "1e30"])
    assert "error: round 1" in stderr and not os.path.exists(tmp_path / "out.state")


# ---------------------------------------------------------------- bad flags and files

@pytest.mark.parametrize("own,message", [
    (["--strategy", "FedSum"], "--strategy FedSum: unknown, choose from Bulyan, "),
    (["--strategy", "FedAdam", "eta_x=1"], "FedAdam has no parameter eta_x; it has "),
    (["--strategy", "FedAdam", "eta=fast"], "--strategy FedAdam eta=fast: not a number"),
    (["--strategy", "FedAdam", "eta=nan"], "is not finite"),
    (["--strategy", "QFedAvg"], "needs client_learning_rate"),
    (["--privacy", "DifferentialPrivacyServerSideFixedClipping", "noise_multiplier=1"],
     "needs clipping_norm"),
    (["--privacy", "DifferentialPrivacyServerSideFixedClipping", "noise_multiplier=1",
      "clipping_norm=-1"], "The clipping norm should be a positive value"),
    (["--privacy", "DifferentialPrivacyServerSideFixedClipping", "noise_multiplier=1",
      "clipping_norm=1", "--transport", "bf16"], "leave out --transport bf16"),
    (["--num_clients", "3"], "--num_clients 3: only 2 clients are simulated"),
    (["--min_clients", "3"], "--min_clients must be <= the 2 clients, got 3"),
    (["--rounds", "0"], "--rounds must be >= 1, got 0"),
    (["--client", "just words"], "must be KEY=VALUE"),
    (["--client", "data=x.json colour=red"], "a client has no setting 'colour'; it has name, data"),
    (["--client", "name=b"], "two clients are named b"),
    (["--client", "name=c"], "c: has no data"),
    (["--client", "name=c data=missing.json"], "missing.json: no such file"),
    (["--client", "name=c data=empty.json"], "empty.json: the file is empty"),
    (["--client", "name=c data=a.json processes=none"], "processes must be >= 1, got none"),
    (["--simulate", "2"], "leave out one of the two"),
])
def test_bad_settings_are_one_line(bert, files, tmp_path, own, message):
    (tmp_path / "empty.json").write_text("")
    _, stderr = federate(tmp_path / "out", *clients(files, "a", "b"), *own, code=1, cwd=tmp_path,
                         flags=["--query_encoder", bert])
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr, stderr
    assert not os.path.exists(tmp_path / "out.jsonl")


@pytest.mark.parametrize("own,message", [
    (["--client", "name=a data='a.json"],
     "--client: .* cannot be split into words .*close each quote"),
    (["--client", "name=a data={a} flags=\\'"], "a: flags: .* cannot be split into words"),
    (["--client", "name=.. data={a}"], "a client's name must have .*, got '..'"),
    (["--client", "data={a} folder=x", "--client", "data={a} folder=./x"], "two clients have the "),
    (["--simulate", "2", "--data", "out.clients/client1.jsonl"], "client1.jsonl: a "
     "client's part would replace this"),
    (["--simulate", "2", "--data", "{a}", "--strategy", "FedAvg", "fraction_train=2"],
     "fraction_train must be > 0 and <= 1, got 2"),
    (["--simulate", "2", "--data", "{a}", "--strategy", "FedAvg", "min_train_nodes=9"],
     "has no parameter min_train_nodes"),
])
def test_bad_settings(bert, files, tmp_path, monkeypatch, own, message):
    import federate as script
    monkeypatch.setattr(client_side, "RUNS", {})
    monkeypatch.setattr(client_side, "SHARED_MODELS", {})
    monkeypatch.chdir(tmp_path)
    os.mkdir("out.clients")
    (tmp_path / "out.clients" / "client1.jsonl").write_bytes((files / "a.json").read_bytes())
    own = [word.replace("{a}", f"{files}/a.json") for word in own]
    with pytest.raises(InputError, match=message):
        script.main(script.parse_command_line(["out", "--mode", "retriever", *own, "--",
                                               *RETRIEVER, "--query_encoder", bert]))
    assert (tmp_path / "out.clients" / "client1.jsonl").read_bytes()


def test_a_client_with_another_model_is_named(bert, files, tmp_path):
    other = make_bert(tmp_path / "other", hidden_size=16)
    stdout, _ = federate(
        tmp_path / "out", "--rounds", "1", *clients(files, "a"), "--client",
        f"name=odd data={files}/b.json flags='--query_encoder {other}'",
        flags=["--query_encoder", bert])
    assert "left out odd: query_encoder.model.embeddings" in stdout
    assert re.search(r"is \(\d+, 32\) at the server, \(\d+, 16\) at this client; all must", stdout)
    assert list(rows(tmp_path / "out")[1]["clients"]) == ["a"]


def test_what_is_missing_is_said(files, tmp_path):
    _, stderr = run("federate.py", tmp_path / "out", "--mode", "retriever", code=1)
    assert "give --simulate K --data FILE, or a --client for each" in stderr
    _, stderr = run("federate.py", tmp_path / "out", "--mode", "retriever", "--simulate", "2",
                    "--data", files / "a.json", code=1)
    assert "--mode retriever needs the training script's flags after its own: -- FLAGS" in stderr
    _, stderr = federate(tmp_path / "out", "--simulate", "2", "--data", files / "a.json",
                         flags=["--no_such_flag"], code=1)
    assert "train_dense.py does not take these flags" in stderr


def test_clients_search_their_own_corpora(tiny, files, tmp_path):
    """Check that with a frozen retriever each client reads passages of its own documents."""
    own = []
    for name in ("a", "b"):
        documents = [{"id": f"{name}{i}", "text": f"{name} {WORDS[i]} {WORDS[i + 1]}"}
                     for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
        own += ["--client", f"name={name} data={files}/reader-{name}.json "
                f"corpus={tmp_path}/{name}.jsonl"]
    federate(tmp_path / "out", "--rounds", "1", *own, mode="generator",
             flags=["--t5_name", tiny, "--retriever", "bm25", "--num_retrieved", "1", "--corpus",
                    tmp_path / "a.jsonl", "--eval_file", files / "reader.json"])
    for name in ("a", "b"):
        found = open(tmp_path / "out.clients" / f"{name}.retrieved" / "train.jsonl").read()
        ids = {context["id"][0] for line in found.splitlines()
               for context in json.loads(line)["ctxs"]}
        assert ids == {name}


# ---------------------------------------------------------------- alternation

def test_alternation(bert, tiny, files, tmp_path, launcher, monkeypatch, capsys):
    """Alternate in this process, so that retrieve.py and test.py start without importing."""
    import federate as script
    monkeypatch.setattr(client_side, "RUNS", {})
    monkeypatch.setattr(client_side, "SHARED_MODELS", {})
    monkeypatch.setattr(alternation.sys, "executable", launcher)
    own = ["--mode", "alternate", "--turns", "2", "--rounds", "1", "--retrieve_flags", "--hits 2",
           *clients(files, "reader-b"), "--", *RETRIEVER, "--query_encoder", bert,
           "--corpus", files / "corpus.json", "--loss", "fid-kd", "--", *READER, "--t5_name", tiny,
           "--eval_file", files / "reader-a.json"]
    script.main(script.parse_command_line([str(tmp_path / "out"), *map(str, own)]))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("turn")] == [
        "turn 1/2: finding contexts", "turn 1/2: scoring contexts", "turn 2/2: finding contexts",
        "turn 2/2: scoring contexts"]
    run("test.py", tmp_path / "out.generator", files / "reader-a.json")
    for mode in ("retriever", "generator"):
        assert [row["round"] for row in rows(f"{tmp_path}/out.{mode}")] == [0, 1, 2]
    scored = [json.loads(line) for line in open(
        tmp_path / "out.clients" / "reader-b" / "scored.jsonl")]
    assert len(scored) == 8 and all("retrieval_score" in passage for record in scored
                                    for passage in record["ctxs"])
    stdout, _ = run("federate.py", tmp_path / "out", "--resume", *own)
    assert stdout.count("done in") == 2 and "finding" not in stdout


@pytest.mark.parametrize("done,expected", [
    ((0, 0), ["find", "retrieve", "generator", "score", "retriever"] * 2),
    ((2, 3), ["find", "retrieve", "generator", "score", "retriever"]),  # in the reader's rounds
    ((3, 4), ["generator", "retriever"]),                               # in the retriever's
    ((1, 2), ["generator", "retriever", "find", "retrieve", "generator", "score", "retriever"]),
    ((4, 4), ["generator", "retriever"]),                               # all is done
])
def test_alternation_goes_on_where_it_was_stopped(monkeypatch, done, expected):
    """Check that contexts are not found again in a turn whose retriever has changed since."""
    import federate as script
    steps = []

    def train(server, last):
        steps.append(server.task.mode)
        server.run.progress.total_updates = last

    def open_server(mode, dev=""):
        server = make_server([reply_with(ONES)])
        server.task = argparse.Namespace(mode=mode)
        server.run.progress.total_updates = done[mode == "generator"]
        server.run.num_contexts = 2
        return server
    monkeypatch.setattr(alternation, "run_rounds", train)
    monkeypatch.setattr(alternation, "ask", lambda server, turn, query: steps.append(query))
    monkeypatch.setattr(alternation, "find_own_contexts", lambda *_: steps.append("find"))
    monkeypatch.setattr(alternation, "read_records", lambda *_: [])
    args = script.parse_command_line(["out", "--mode", "alternate", "--rounds", "2", "--turns", "2",
                                      "--", "--", "--t5_name", "t5", "--eval_file", "dev.json"])
    alternation.alternate(script.make_settings(args), script.make_tasks(args), open_server)
    assert steps == expected
