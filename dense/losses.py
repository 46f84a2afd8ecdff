"""The losses of retriever training: pure functions of scores, each with the paper it comes from.

Q queries; K keys of all queries side by side; G keys in a query's own group. K is Q * G, or less if
some queries have only a positive. The scores are already divided by the temperature of the metric.
Every loss is a scalar, the mean over the queries.
"""
import torch
import torch.nn.functional as F

MASKED = -1e9  # instead of -inf, because the logsumexp of a row of -inf has no gradient


def contrastive(scores, positives, masked=None):
    """Return InfoNCE with in-batch and hard negatives, the mean of -log softmax(scores)[positive]
    (DPR, arXiv 2004.04906, eq. 2).

    scores (Q, K); positives (Q) column indices; masked (Q, K) bool, True at keys to leave out.
    """
    if masked is not None:
        scores = scores.masked_fill(masked, MASKED)
    return F.cross_entropy(scores, positives)


def distillation(scores, teacher_scores, teacher_temperature=1.0, student_temperature=1.0):
    """Return KL(softmax(teacher / Tt) || softmax(student / Ts)) over each query's own group
    (LLM-Embedder, arXiv 2310.07554).

    scores, teacher_scores (Q, G). With relevance labels as the teacher it is ListNet's listwise
    loss.
    """
    target = torch.softmax(teacher_scores / teacher_temperature, -1)
    log_student = torch.log_softmax(scores / student_temperature, -1)
    return F.kl_div(log_student, target, reduction="batchmean")


def stable_distillation(scores, groups, teacher_scores, teacher_temperature=1.0):
    """Return LLM-Embedder's stabilized distillation (arXiv 2310.07554): a contrastive loss per
    candidate, weighted by its teacher score.

    A query's candidates come in falling order of their teacher scores. Candidate i contrasts with
    all keys except the candidates above it: -log(exp(s_i) / (sum of exp over candidates from i on +
    sum of exp over all other keys)). scores (Q, K); groups (Q, G) the columns of each query's
    candidates; teacher_scores (Q, G).
    """
    weights = torch.softmax(teacher_scores / teacher_temperature, -1)                   # (Q, G)
    candidates = scores.gather(1, groups)                                               # (Q, G)
    others = scores.scatter(1, groups, MASKED).logsumexp(1, keepdim=True)               # (Q, 1)
    from_here_on = candidates.flip(1).logcumsumexp(1).flip(1)                           # (Q, G)
    losses = torch.logaddexp(from_here_on, others) - candidates                         # (Q, G)
    return (weights * losses).sum(1).mean()


def fid_kd(scores, reader_scores, teacher_temperature=1.0, student_temperature=1.0):
    """Return the distillation from a reader's cross-attention, averaged over queries and keys as in
    FiD's code (arXiv 2012.04584): distillation() divided by G.

    scores, reader_scores (Q, G).
    """
    return distillation(scores, reader_scores, teacher_temperature,
                        student_temperature) / scores.shape[1]


def emdr2(scores, log_likelihoods, teacher_temperature=1.0, student_temperature=1.0):
    """Return -log p(answer | query) with the retrieved key as a hidden variable: the sum over a
    query's own group of p(key | query) p(answer | query, key) (EMDR2, arXiv 2106.05346; Atlas,
    arXiv 2208.03299, section 2.2).

    Its gradient is that of KL from p(key | query, answer), a teacher that weighs a key by what the
    student thought of it before. scores, log_likelihoods (Q, G).
    """
    log_student = torch.log_softmax(scores / student_temperature, -1)
    return -(log_student + log_likelihoods / teacher_temperature).logsumexp(-1).mean()


def mark_copies(identities, positives):
    """Return (B, K) bool, True where a key is one of a query's positives.

    identities (K) int64, equal for equal documents; positives: B lists of such numbers.
    """
    rows = [torch.isin(identities, torch.tensor(row, device=identities.device))
            for row in positives]
    return torch.stack(rows) if rows else identities.new_zeros((0, len(identities)), dtype=bool)
