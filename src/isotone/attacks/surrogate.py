"""A regression on the edits that were evaluated, which says what other edits would do: learning without gradients.

Shapes: P attackable positions, N evaluated edits, V vocabulary, D embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isotone.attacks.search import Pairs, top_pairs

SHARED = 0.5
"""Correlation of what one token does at two positions, before anything is known."""
NOISE = 0.1
"""Variance of a gain that its token and position do not explain, in variances of the gains."""
MOST = 1024
"""Evaluations that are learned from, the latest ones: solving costs their number cubed."""


@dataclass(frozen=True)
class Evaluated:
    """What edits of one text did, in the order in which they were evaluated.

    Attributes:
        positions_N: counted from the first attackable one.
        tokens_N: what was written.
        gains_N: nats added to the loss of the text as it stood then, fp64; what is not finite is not learned from.
    """

    positions_N: Tensor  # noqa: N815 - shape suffixes
    tokens_N: Tensor  # noqa: N815
    gains_N: Tensor  # noqa: N815

    def learnable(self) -> "Evaluated":
        """Return the latest that have a finite gain."""
        kept_N = self.gains_N.isfinite().nonzero().flatten()[-MOST:]
        return Evaluated(self.positions_N[kept_N], self.tokens_N[kept_N], self.gains_N[kept_N])


def promising_pairs(
    embeddings_VD: Tensor,
    admissible_V: Tensor,
    current_P: Tensor,
    allowed_P: Tensor,
    evaluated: Evaluated,
    tried: Pairs,
    count: int,
) -> Pairs:
    """Return the candidates of one text that are expected to raise its loss most, best first.

    Args:
        embeddings_VD: what the model reads for each token.
        admissible_V: which tokens may be written.
        current_P: the tokens that stand there; none of them is written where it is.
        allowed_P: where a token may be written.
        evaluated: at least one edit with a finite gain.
        tried: pairs that were evaluated on this very text; none of them is returned.
        count: at most so many.
    """
    gains_PV = predicted_gains(token_features(embeddings_VD), evaluated.learnable(), len(current_P))
    gains_PV[~allowed_P] = -torch.inf
    gains_PV[:, ~admissible_V] = -torch.inf
    gains_PV[torch.arange(len(current_P)), current_P] = -torch.inf
    gains_PV[tried] = -torch.inf
    return top_pairs(gains_PV, count)


def token_features(embeddings_VD: Tensor) -> Tensor:
    """Return embeddings on the CPU, centered, and scaled to a mean square norm of 1."""
    centered_VD = embeddings_VD.float().cpu()
    centered_VD = centered_VD - centered_VD.mean(dim=0)
    return centered_VD / centered_VD.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)


def predicted_gains(features_VD: Tensor, evaluated: Evaluated, num_positions: int) -> Tensor:
    """Return what each token is expected to add to the loss at each position, fp32 [P, V].

    The posterior mean of a Gaussian process (Rasmussen & Williams 2006, algorithm 2.1). Its covariance of two edits is
    exp(−‖e − e'‖²/2) of their tokens' features, times ``SHARED`` where they are at different positions.
    """
    positions_N, tokens_N, gains_N = evaluated.positions_N, evaluated.tokens_N, evaluated.gains_N
    squares_V = features_VD.square().sum(dim=1)
    distances_VN = squares_V[:, None] + squares_V[tokens_N] - 2 * features_VD @ features_VD[tokens_N].T
    alike_VN = (-distances_VN.clamp_min(0) / 2).exp()
    near_PN = torch.where(torch.arange(num_positions)[:, None] == positions_N, 1.0, SHARED)
    covariance_NN = (alike_VN[tokens_N] * near_PN[positions_N]).double()
    covariance_NN = covariance_NN + NOISE * torch.eye(len(gains_N), dtype=torch.float64)
    mean, scale = gains_N.mean(), gains_N.std(correction=0).clamp_min(1e-12)
    factor_NN = torch.linalg.cholesky(covariance_NN)
    weights_N = torch.cholesky_solve(((gains_N - mean) / scale)[:, None], factor_NN)[:, 0].float()
    return mean.float() + scale.float() * ((near_PN * weights_N) @ alike_VN.T)
