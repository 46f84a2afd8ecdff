"""The losses of retriever training against their definitions."""
import pytest
import torch

from dense import losses


def test_contrastive_masks_duplicates():
    scores = torch.tensor([[2.0, 1.0, 3.0, 0.5], [0.1, 0.2, 2.5, 0.3]])
    identities, positives = torch.tensor([7, 8, 7, 9]), torch.tensor([0, 2])
    masked = losses.duplicates(identities, positives)
    assert masked.tolist() == [[False, False, True, False], [True, False, False, False]]
    first = -torch.log_softmax(torch.tensor([2.0, 1.0, 0.5]), 0)[0]
    second = -torch.log_softmax(torch.tensor([0.2, 2.5, 0.3]), 0)[1]
    torch.testing.assert_close(losses.contrastive(scores, positives, masked), (first + second) / 2)


def test_stable_distillation_equals_its_definition():
    """The i-th candidate against all keys but the candidates above it, weighted by
    softmax(teacher), candidate by candidate.
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
