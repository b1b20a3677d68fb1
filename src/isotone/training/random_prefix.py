"""Random tokens in the prefix (of pairs: the source) of training rows: what ``edit_trained`` learns to read past.

Shapes: B rows, L tokens of a row, N admissible tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isotone.determinism import stream_key


@dataclass(frozen=True)
class RandomPrefix:
    """Which tokens of a step's rows are replaced, and by what: a function of (seed, step, row) alone.

    Attributes:
        share: of the attackable positions of a row that are replaced; the number is rounded, and at least one.
        attackable: the positions that an attack may edit.
        tokens_N: ids to draw from, uniformly; a draw may happen to be the token that is there.
        seed: the run's.
        kept: ids that stay where they are: EOS and padding of a source.
    """

    share: float
    attackable: range
    tokens_N: Tensor  # noqa: N815 - shape suffix
    seed: int
    kept: tuple[int, ...] = ()

    def __call__(self, ids_BL: Tensor, step: int) -> Tensor:
        """Return a step's rows, int64 [B, L], as the model reads them; the rows given stay the labels."""
        edited_BL = ids_BL.clone()
        within = [p for p in self.attackable if p < ids_BL.shape[1]]
        for row, ids in enumerate(ids_BL.tolist()):
            positions = [p for p in within if ids[p] not in self.kept]
            count = max(1, round(self.share * len(positions)))
            rng = np.random.default_rng(stream_key(self.seed, "random_prefix", step, row))
            chosen = torch.from_numpy(rng.choice(positions, count, replace=False))
            drawn = torch.from_numpy(rng.integers(len(self.tokens_N), size=count))
            edited_BL[row, chosen] = self.tokens_N[drawn]
        return edited_BL
