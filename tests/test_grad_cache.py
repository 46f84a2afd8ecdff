"""GradCache: the loss and gradients of the plain batch, with dropout."""
import pytest
import torch
from torch import nn

from conftest import make_bert
from dense import losses
from dense.model import BiEncoder, CrossEncoder
from layers import grad_cache


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_gradcache_equals_the_plain_batch_with_dropout(kind, tmp_path, monkeypatch):
    folder = make_bert(tmp_path / "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 17, 1, 30, 8, 8, 2, 9)]
    results = []
    for plain in (True, False):
        model = (BiEncoder if kind == "bi" else CrossEncoder).open(folder).train()
        if kind == "cross":
            nn.init.normal_(model.model.classifier.weight,
                            generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            if plain:  # the same chunks, all activations kept
                patch.setattr(grad_cache, "checkpoint", lambda function, *args,
                              **_: function(*args))
            if kind == "bi":
                scores = model.score(*model(texts[:4], texts, chunk_size=3))
            else:
                scores = model([(text, [0] * len(text)) for text in texts], chunk_size=3).view(2, 4)
        loss = losses.contrastive(scores, torch.arange(len(scores)))
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (plain_loss, plain_grads), (loss, grads) = results
    assert torch.equal(plain_loss, loss) and len(plain_grads) == len(grads) > 20
    for a, b in zip(plain_grads, grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
