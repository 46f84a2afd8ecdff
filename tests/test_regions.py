"""Compiled regions against the functions as they are written; what a GPU must not wait for; how
many operations a layer starts.
"""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from conftest import ROOT, make_records, run
from data import pack_passages
from dense.text_encoder import TextEncoder
from golden_retrievers import CONFIG
from layers import packed_attention, packing, regions
from layers import t5 as layers
from layers.packing import pack_texts
from model import FiDT5

GRAPHS = 3  # of the reader in training: project, finish_block, decode_block


@pytest.fixture
def compiled(monkeypatch):
    """Compile regions on the CPU, without generating code; the attention is the one of a GPU."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(regions, "BACKEND", "aot_eager")
    monkeypatch.setattr(packed_attention, "attention", packed_attention.fused_attention)

    def switch(is_on):
        monkeypatch.setitem(regions.IS_COMPILED, "cpu", is_on)
    yield switch
    torch._dynamo.reset()


def make_reader(**changes):
    torch.manual_seed(0)
    config = {"vocab_size": 500, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4,
              "d_kv": 8, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    reader = FiDT5(T5ForConditionalGeneration(T5Config(**config | changes)))
    reader.config.eos_token_id = -1  # no answer ends early
    return reader


def random_passages(seed, B, N, longest):
    rng = torch.Generator().manual_seed(seed)
    questions = []
    for _ in range(B):
        lengths = torch.randint(1, longest + 1, (N,), generator=rng).tolist()
        questions.append([torch.randint(3, 400, (n,), generator=rng).tolist() for n in lengths])
    return pack_passages(questions, 0), torch.randint(3, 400, (B, 5 + seed), generator=rng)


def step(reader, batch, bf16=False):
    """Return (loss, gradients) of a training step."""
    reader.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = reader(*batch)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in reader.named_parameters()}


@pytest.mark.parametrize("kind", ["gated, bfloat16", "dropout, recomputed"])
def test_a_compiled_reader_trains_alike(kind, compiled, monkeypatch):
    """Check the loss, all gradients and, over four shapes, the number of compiled graphs."""
    if "dropout" in kind:  # of torch in both forms
        monkeypatch.setattr(layers, "dropout", lambda x, p: F.dropout(x, p))
    reader = make_reader(feed_forward_proj="gated-gelu" if "gated" in kind else "relu",
                         dropout_rate=0.3 if "dropout" in kind else 0.0).train()
    reader.set_checkpoint("recomputed" in kind)
    bf16 = "bfloat16" in kind
    for seed, (B, N, longest) in enumerate([(2, 5, 30), (3, 7, 41), (2, 3, 64), (4, 2, 192)]):
        batch = random_passages(seed, B, N, longest)
        compiled(False)
        want_loss, want = step(reader, batch, bf16)
        compiled(True)
        loss, got = step(reader, batch, bf16)
        assert counters["stats"]["unique_graphs"] == GRAPHS and not counters["graph_break"]
        torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=1e-5)
        for name, gradient in want.items():
            atol = 2e-2 * float(gradient.abs().max()) if bf16 else 1e-5
            torch.testing.assert_close(got[name], gradient, atol=atol, rtol=1e-4)
    assert not counters["inductor"]


def test_a_compiled_reader_answers_alike(compiled):
    """Check greedy ids and scores; questions that end change the number of rows."""
    reader = make_reader().eval()
    for seed, shape in enumerate([(2, 5, 30), (3, 7, 41), (4, 2, 64)]):
        passages, _ = random_passages(seed, *shape)
        compiled(False)
        want, scores = reader.generate(passages, 7, return_scores=True)
        reader.config.eos_token_id = int(want[0, 3])  # the first question ends early
        want = reader.generate(passages, 7)
        compiled(True)
        assert torch.equal(reader.generate(passages, 7), want)
        reader.config.eos_token_id = -1
        torch.testing.assert_close(reader.generate(passages, 7, return_scores=True)[1], scores)


def make_encoder(pooling="mean", **changes):
    torch.manual_seed(0)
    return TextEncoder(BertModel(BertConfig(**CONFIG | changes)), pooling)


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_a_compiled_retriever_trains_alike(chunk_size, compiled):
    """Check vectors and gradients, also with GradCache, which computes each chunk twice."""
    encoder = make_encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    for longest in (9, 20, 30, 31):
        lengths = torch.randint(1, longest + 1, (8,)).tolist()
        texts = [torch.randint(3, 120, (n,)).tolist() for n in lengths]
        results = []
        for is_on in (False, True):
            compiled(is_on)
            encoder.zero_grad()
            vectors = encoder(texts, chunk_size=chunk_size)
            vectors.square().sum().backward()
            results.append([vectors, *(weight.grad for weight in encoder.parameters()
                                       if weight.grad is not None)])
        for want, got in zip(*results):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_the_plain_functions_run(compiled, monkeypatch, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no C compiler here")
    monkeypatch.setattr(regions, "BACKEND", fail)
    fresh = regions.region(layers.project.__wrapped__)
    reader = make_reader()
    layer, x = reader.t5.encoder.encoder.block[0].module.layer[0], torch.randn(8, 32)
    compiled(True)
    assert torch.equal(fresh(layer, x), layers.project.__wrapped__(layer, x))
    note = capsys.readouterr().out
    assert "torch.compile failed" in note and "no C compiler" in note and "--no_compile" in note
    assert not regions.IS_COMPILED["cpu"]


# ---------------------------------------------------------------- what a GPU runs

@pytest.mark.parametrize("align", [1, 8, 16])
def test_the_alignment_changes_nothing(align, monkeypatch):
    """Check loss and gradients, and that the ids of padded rows have no effect."""
    reader = make_reader().train()
    batch = random_passages(0, 2, 5, 30)
    want_loss, want = step(reader, batch)
    monkeypatch.setitem(packing.ALIGN, "cpu", align)
    monkeypatch.setattr(packed_attention, "attention", packed_attention.fused_attention)
    passages, labels = random_passages(0, 2, 5, 30)
    texts = passages.texts
    assert texts.is_real.all() == (align == 1)
    noise = torch.randint(3, 400, texts.ids.shape)
    texts = texts._replace(ids=texts.ids.where(texts.is_real, noise))
    loss, got = step(reader, (passages._replace(texts=texts), labels))
    torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("align", [8, 16])
def test_the_alignment_changes_no_vector(align, monkeypatch):
    encoder = make_encoder("max+mean+weighted_mean+mean_sqrt_len+cls+last").eval()
    encoder.separator = 7
    texts = [torch.randint(3, 120, (n,)).tolist() for n in (5, 17, 1, 31, 8, 8, 2)]
    results = []
    for rows in (1, align):
        monkeypatch.setitem(packing.ALIGN, "cpu", rows)
        encoder.zero_grad()
        vectors = encoder(texts)
        vectors.square().sum().backward()
        results.append([vectors, *(weight.grad for weight in encoder.parameters()
                                   if weight.grad is not None)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [64, 192])
def test_gradients_are_finite_where_cudnn_has_nan(length):
    """Check the lengths of pytorch issue 196678 with padded keys."""
    reader = make_reader().train()
    ids = [[5] * length, [6] * (length - 3), [7] * (length - 17)]
    _, gradients = step(reader, (pack_passages([ids], 0), torch.full((1, 3), 5)))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_cudnn_computes_no_attention():
    """Check that the only call of SDPA is made with the other kernels."""
    seen = []

    def record(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return args[0]
    q = torch.randn(1, 2, 8, 4)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    packed_attention.F.scaled_dot_product_attention = record
    try:
        packed_attention.fused_attention(q, q, q, torch.zeros(1, 1, 1, 8), 0.0, 1.0)
        packed_attention.fused_attention(q, q, q, None, 0.0, 1.0)
    finally:
        packed_attention.F.scaled_dot_product_attention = sdpa
    assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_step_waits_for_no_value_of_the_gpu(use_checkpoint, monkeypatch):
    """Run a step from the packed passages to the gradients on tensors without values, which raise
    an error where a step on a GPU would wait for one.
    """
    monkeypatch.setattr(packed_attention, "attention", packed_attention.fused_attention)
    monkeypatch.setattr(layers, "dropout", lambda x, p: F.dropout(x, p))
    passages, labels = random_passages(0, 2, 5, 30)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        reader = make_reader(dropout_rate=0.1).train()
        reader.set_checkpoint(use_checkpoint)
        texts = passages.texts._replace(**fake(mode, passages.texts))
        passages = passages._replace(**fake(mode, passages), texts=texts)
        loss, _ = reader(passages, mode.from_tensor(labels))
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert all(weight.grad is not None for weight in reader.parameters())


def fake(mode, packed):
    """Return {name: tensor without values} of a NamedTuple's tensors."""
    return {name: mode.from_tensor(value) for name, value in packed._asdict().items()
            if isinstance(value, torch.Tensor)}


def test_encoding_texts_waits_for_no_value_of_the_gpu(monkeypatch):
    monkeypatch.setattr(packed_attention, "attention", packed_attention.fused_attention)
    packed = pack_texts([[5] * n for n in (5, 17, 1, 30, 8, 8, 2)], 0, align=16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        encoder = make_encoder("mean+cls", hidden_dropout_prob=0.0,
                               attention_probs_dropout_prob=0.0).train()
        encoder.separator = 7
        vectors = encoder.encode_chunk(packed._replace(**fake(mode, packed)))
        vectors.sum().backward()
    assert vectors.shape == (7, 64)


# ---------------------------------------------------------------- how much a layer starts

class Counter(TorchDispatchMode):
    """Count the operations that start work on a GPU: all but views and allocations."""
    FREE = {"view", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select",
            "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
            "unsqueeze", "empty", "empty_like", "empty_strided"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **kwargs or {})


class OneKernel(torch.autograd.Function):
    """Stand for the attention of a GPU: one operation forward, and one backward."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.shapes = [x.shape for x in (q, k, v, bias)]
        return v.new_zeros(v.transpose(1, 2).shape).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        everything = grad.new_zeros(sum(map(math.prod, ctx.shapes)))
        parts = everything.split(list(map(math.prod, ctx.shapes)))
        n, H, L, d = ctx.shapes[0]
        qkv = [part.view(n, L, H, d).transpose(1, 2) for part in parts[:3]]
        return *qkv, parts[3].view(ctx.shapes[3])


def test_a_layer_starts_few_kernels(monkeypatch):
    """Check a training step of an encoder layer on 200 passages of 100 to 240 tokens. Before its
    rows were aligned and its regions compiled (commit cda6cad) it started 151 operations.
    """
    monkeypatch.setattr(packed_attention, "attention",
                        lambda q, k, v, bias, p, scale: OneKernel.apply(q, k, v, bias))
    lengths = torch.randint(100, 241, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    packed = pack_texts([[5] * length for length in lengths], 0, "cuda")
    groups = packed_attention.make_groups(packed.shapes, packed.is_real, torch.randn(4, 240, 240))
    groups = [group._replace(bias=group.bias.requires_grad_()) for group in groups]
    block = make_reader().t5.encoder.encoder.block[1].module
    x, y = (torch.randn(len(packed.ids), 32, requires_grad=True) for _ in range(2))
    grad, grad_qkv = torch.randn(len(x), 32), torch.randn(len(x), 3, 4, 8)
    with Counter() as whole:
        layers.encode_block(block, x, groups, 0.0).backward(grad)
    block.zero_grad()
    x.grad = None
    with Counter() as regions_alone:
        results = layers.project(block.layer[0], x), layers.finish_block(block, x, y, 0.0)
        torch.autograd.backward(results, [grad_qkv, grad])
    assert len(groups) == 9
    assert whole.count - regions_alone.count <= 151 // 2


# ---------------------------------------------------------------- several processes

COMPILED_TRAINING = """
import sys
sys.path.insert(0, {root!r})
import train_epoch
from layers import packed_attention, regions
from utils import run_script
regions.BACKEND = "aot_eager"
regions.IS_COMPILED["cpu"] = True
packed_attention.attention = packed_attention.fused_attention
run_script(train_epoch.main, train_epoch.parse_args())
"""


def test_compiled_regions_under_ddp(tiny, tmp_path):
    """Check that two compiled processes train the weights of a plain one, with uneven numbers of
    micro-batches: of seven records the second update has three, two of them for one process.
    """
    (tmp_path / "records.json").write_text(json.dumps(make_records(7)))
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED_TRAINING.format(root=str(ROOT)))
    flags = ["records.json", "records.json", "--t5_name", tiny, "--num_contexts", 3,
             "--max_length", 20, "--dropout", 0, "--epochs", 1, "--lr", 1e-2, "--use_checkpoint",
             "--num_warmup_steps", 0, "--eval_answer_maxlength", 2]
    run("train_epoch.py", "plain", *flags, "--batch_size", 4, cwd=tmp_path)
    out, _ = run(script, "compiled", *flags, "--batch_size", 1, "--grad_accumulation", 2,
                 processes=2, cwd=tmp_path)
    assert "torch.compile failed" not in out
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    got = load_file(tmp_path / "compiled" / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, atol=1e-4, rtol=1e-3)
