"""Controls that need no training: what any adapter has to beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PRIOR = 0.1
"""Votes that every class has before any neighbour votes, of `k` or fewer in all: so no probability is zero."""


def nearest_neighbours(
    support_features_unf: Tensor,
    support_targets_un: Tensor,
    support_weight_un: Tensor,
    test_features_unf: Tensor,
    k: int,
    classes: int,
    temperature: float = 0.1,
) -> Tensor:
    """Probabilities of classes by the votes of the k nearest support examples, for every user's test examples.

    Neighbours are nearest by cosine similarity s and vote with weight exp((s - largest s) / temperature); each class
    has 0.1 votes beforehand. With fewer than k support examples, all vote; those of weight 0 are padding, and do not.

    Shapes: support_features_unf (U, N, W), support_targets_un (U, N) int64, support_weight_un (U, N),
    test_features_unf (U, M, W); result (U, M, C), rows sum to 1.
    """
    support, test = F.normalize(support_features_unf, dim=2), F.normalize(test_features_unf, dim=2)
    padding_u1n = (support_weight_un == 0)[:, None]
    similarity_umn = (test @ support.transpose(1, 2)).masked_fill(padding_u1n, -torch.inf)
    nearest = similarity_umn.topk(min(k, similarity_umn.shape[2]), dim=2)
    first = nearest.values[..., :1].nan_to_num(neginf=0.0)
    votes_umk = torch.exp((nearest.values - first) / temperature)
    targets_umn = support_targets_un[:, None].expand(similarity_umn.shape)
    prior = votes_umk.new_full((*votes_umk.shape[:2], classes), _PRIOR)
    votes_umc = prior.scatter_add(2, targets_umn.gather(2, nearest.indices), votes_umk)
    return votes_umc / votes_umc.sum(2, keepdim=True)
