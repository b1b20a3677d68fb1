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
        protocol, shuffled_BLD = problem.protocol, grad_BLD.clone()
        for index, (key, clean_L) in enumerate(zip(state["keys_B"], state["clean_BL"], strict=True)):
            own_N = protocol.editable(clean_L).nonzero().flatten() + protocol.attackable.start
            order_N = torch.from_numpy(stream(key, len(state["history_RB2"])).permutation(len(own_N)))
            shuffled_BLD[index, own_N.to(grad_BLD.device)] = grad_BLD[index, own_N[order_N].to(grad_BLD.device)]
        return shuffled_BLD
