"""The losses of retriever training: pure functions of scores, each with the paper it comes from.

Q queries, K keys of all queries side by side (K = Q * G where every query has a group of G); scores are already divided by
the temperature of the metric. All return a scalar mean over the queries.
"""
import torch
import torch.nn.functional as F

LOWEST = -1e9  # finite: a target probability of 0 times it is 0


def contrastive(scores, positives, masked=None):
    """InfoNCE with in-batch and hard negatives (DPR, arXiv 2004.04906, eq. 2): -log softmax of each query's positive.

    scores (Q, K), positives (Q) columns; masked (Q, K) bool, True for keys that do not count.
    """
    if masked is not None:
        scores = scores.masked_fill(masked, LOWEST)
    return F.cross_entropy(scores, positives)


def distillation(scores, teacher_scores, teacher_temperature=1.0, student_temperature=1.0):
    """KL(softmax(teacher / Tt) || softmax(student / Ts)) over each query's own group, (Q, G) both.

    LLM-Embedder (arXiv 2310.07554); with relevance labels as teacher it is the listwise loss of graded training (ListNet).
    """
    target = torch.softmax(teacher_scores / teacher_temperature, -1)
    return F.kl_div(torch.log_softmax(scores / student_temperature, -1), target, reduction="batchmean")


def stable_distillation(scores, groups, teacher_scores, teacher_temperature=1.0):
    """LLM-Embedder's stabilized distillation (arXiv 2310.07554): a contrastive loss per candidate, weighted by its teacher.

    The candidates of a query come in falling teacher order; the i-th contrasts with all keys but those ranked above it.
    scores (Q, K); groups (Q, G) the columns of each query's candidates; teacher_scores (Q, G).
    """
    weights = torch.softmax(teacher_scores / teacher_temperature, -1)
    own = scores.gather(1, groups)                                                     # (Q, G)
    others = scores.scatter(1, groups, LOWEST).logsumexp(1, keepdim=True)              # (Q, 1) of the other queries' keys
    below = own.flip(1).logcumsumexp(1).flip(1)                                        # (Q, G) of the candidates from i on
    return (weights * (torch.logaddexp(below, others) - own)).sum(1).mean()


def fid_kd(scores, reader_scores):
    """Distillation from the reader's cross-attention (arXiv 2012.04584), as FiD computes it: KL averaged over all places.

    scores, reader_scores (Q, G). That is the KL of distillation() divided by G.
    """
    return distillation(scores, reader_scores) / scores.shape[1]


def duplicates(identities, positives):
    """(Q, K) bool: keys that are the same document as the query's positive, the positive itself excepted.

    identities (K) int64, equal for equal documents.
    """
    same = identities[positives][:, None] == identities[None]
    return same.scatter(1, positives[:, None], False)
