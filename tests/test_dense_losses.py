"""The losses of retriever training against their definitions."""
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import train_dense
from dense import losses
from dense.training_data import TaskSettings


def test_contrastive_masks_duplicates():
    scores = torch.tensor([[2.0, 1.0, 3.0, 0.5], [0.1, 0.2, 2.5, 0.3]])
    identities, positives = torch.tensor([7, 8, 7, 9]), torch.tensor([0, 2])
    is_copy = losses.mark_copies(identities, [[7], [7]])
    assert is_copy.tolist() == [[True, False, True, False]] * 2
    others = losses.mark_copies(identities, [[8, 9], [3]])
    assert others.tolist() == [[False, True] * 2, [False] * 4]
    masked = is_copy.scatter(1, positives[:, None], False)
    assert masked.tolist() == [[False, False, True, False], [True, False, False, False]]
    first = -torch.log_softmax(torch.tensor([2.0, 1.0, 0.5]), 0)[0]
    second = -torch.log_softmax(torch.tensor([0.2, 2.5, 0.3]), 0)[1]
    torch.testing.assert_close(losses.contrastive(scores, positives, masked), (first + second) / 2)


def test_stable_distillation_equals_its_definition():
    """Each candidate contrasts with all keys except the candidates above it, weighted by
    softmax(teacher).
    """
    torch.manual_seed(0)
    scores = torch.randn(3, 12)
    teacher = torch.randn(3, 4).sort(1, descending=True).values
    groups = torch.arange(12).view(3, 4)
    expected = 0.0
    for q in range(3):
        weights = torch.softmax(teacher[q], 0)
        for i in range(4):
            left = [k for k in range(12) if k not in groups[q, :i].tolist()]
            loss = torch.logsumexp(scores[q, left], 0) - scores[q, groups[q, i]]
            expected += weights[i] * loss / 3
    torch.testing.assert_close(losses.stable_distillation(scores, groups, teacher), expected)


def test_distillation_is_kl_and_zero_for_equal_scores():
    teacher = torch.tensor([[0.3, 2.0, -1.0]])
    assert losses.distillation(teacher * 2, teacher, 0.5, 1.0).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.softmax(teacher, 1), torch.softmax(teacher.flip(1), 1)
    torch.testing.assert_close(losses.distillation(teacher.flip(1), teacher),
                               (p * (p / q).log()).sum())


def test_emdr2_is_the_answers_likelihood_over_all_keys():
    scores = torch.tensor([[1.0, 0.2, -0.5], [0.0, 2.0, 1.0]], requires_grad=True)
    log_likelihoods = torch.tensor([[-3.0, -0.1, -5.0], [-1.0, -1.0, -1.0]])
    prior = torch.softmax(scores / 0.5, 1)
    likelihood = (prior * (log_likelihoods / 2).exp()).sum(1)
    loss = losses.emdr2(scores, log_likelihoods, 2.0, 0.5)
    torch.testing.assert_close(loss, -likelihood.log().mean())
    # equal likelihoods say nothing about the keys
    gradient, = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient[1], torch.zeros(3))
    # the gradient is that of KL from the keys' posterior
    posterior = (prior.log() + log_likelihoods / 2).detach()
    kl = losses.distillation(scores, posterior, 1.0, 0.5)
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, scores)[0])


@pytest.mark.parametrize("loss", ["kl", "fid-kd"])
def test_one_loss_alone_has_one_temperature(loss):  # E3
    """Cosines are divided by --student_temperature alone, not by --cos_temperature as well."""
    torch.manual_seed(0)
    cosines, teacher = torch.rand(2, 3), torch.randn(2, 3)
    settings = TaskSettings(loss=loss, student_temperature=0.1)
    groups = torch.arange(3).expand(2, 3)
    value = train_dense.distillation_loss(settings, cosines / 0.01, groups, teacher, 0.01)
    expected = losses.distillation(cosines, teacher, 1.0, 0.1)
    torch.testing.assert_close(value, expected / (3 if loss == "fid-kd" else 1))
    # not given: as in the contrastive loss
    settings = TaskSettings(loss=loss)
    value = train_dense.distillation_loss(settings, cosines / 0.01, groups, teacher, 0.01)
    expected = losses.distillation(cosines, teacher, 1.0, 0.01)
    torch.testing.assert_close(value, expected / (3 if loss == "fid-kd" else 1))


def test_llm_embedders_temperature_divides_once_more():  # E3
    """Next to InfoNCE the temperatures multiply, and a line at the start names the product."""
    settings = TaskSettings(student_temperature=0.1)
    assert train_dense.distill_temperature(settings, 0.01) == pytest.approx(0.001)
    lines = []
    run = Namespace(args=Namespace(ranker=False), unwrapped=Namespace(temperature=0.01),
                    task_settings={"qa": settings}, world=Namespace(log=lines.append))
    train_dense.note_temperature(run)
    assert lines == ["distillation of qa divides scores by 0.001 (0.01 x --student_temperature "
                     "0.1)"]
    run.task_settings["qa"] = replace(settings, loss="kl")
    train_dense.note_temperature(run)
    assert lines[1] == "distillation of qa divides scores by 0.1 (--student_temperature)"
    run.task_settings["qa"] = TaskSettings(loss="kl")
    train_dense.note_temperature(run)
    assert len(lines) == 2
