"""HotFlip with its gradient shuffled among positions: the control that shows what the gradient is worth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isotone.attacks.hotflip import HotFlip
from isotone.attacks.interface import Problem, State
from isotone.attacks.protocol import Window
from isotone.attacks.search import stream, stream_keys


@dataclass(frozen=True)
class ShuffledHotFlip(HotFlip):
    """Iterative HotFlip that ranks candidates by the gradients of other positions of the same text.

    Everything else, exact evaluation and cost included, is the same. What is left to the ranking is what holds at any
    position (tokens with large embeddings, say), so a gain over this is what the gradient knows about a place.

    Attributes:
        seed: of the shuffles; a document's depend on it, the document's id and the round.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "iterative":
            raise ValueError(f"method: only iterative HotFlip can be shuffled, found {self.method!r}")

    @property
    def variant(self) -> str:
        """Shuffled."""
        return "shuffled"

    def start(self, problem: Problem, windows: list[Window]) -> State:
        """Return the clean texts and the keys of their streams (keys_B)."""
        return super().start(problem, windows) | {"keys_B": stream_keys(self.seed, "shuffled gradient", windows)}

    def _ranking_gradient(self, problem: Problem, grad_BLD: Tensor, state: State) -> Tensor:
        positions, shuffled_BLD = problem.protocol.attackable, grad_BLD.clone()
        for index, key in enumerate(state["keys_B"]):
            order_P = stream(key, len(state["history_RB2"])).permutation(len(positions))
            shuffled_BLD[index, positions.start : positions.stop] = grad_BLD[
                index, torch.from_numpy(order_P).to(grad_BLD.device) + positions.start
            ]
        return shuffled_BLD
