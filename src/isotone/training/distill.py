"""Distillation: the first steps of a training teach a model what another one computes, before plain loss has its turn.

In the share ``blocks`` the states after each block are matched: ‖h − h*‖² / ‖h*‖², h* being the teacher's, averaged
over blocks and tokens. (Where the norms are LayerNorms, which do not see a state's mean, without the mean.) In the share
``logits`` the predictions are: τ² KL(p*‖p) of the next token at temperature τ (Hinton et al. 2015, 1503.02531). Which
one it is depends on the step alone.

Shapes: B rows, L tokens of a row, T scored tokens, V vocabulary, D hidden size.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotone.config import Distill
from isotone.constraint import ARCHITECTURES
from isotone.errors import IsotoneError
from isotone.pairs import PairLayout
from isotone.scoring import nll_of_logits, token_kl
from isotone.training.memory import is_out_of_memory

Phase = Literal["blocks", "logits"]


def phase_at(recipe: Distill, step: int, total_steps: int) -> Phase | None:
    """Return what is distilled in a step, counted from 0; None where nothing is."""
    blocks, logits = (Fraction(str(share)) for share in (recipe.blocks, recipe.logits))
    if step < math.ceil(blocks * total_steps):
        return "blocks"
    return "logits" if step < math.ceil((blocks + logits) * total_steps) else None


class Distillation:
    """What a trainer asks for the loss of its distilled steps.

    Args:
        recipe: shares of the steps, weight and temperature.
        teacher: brings the teacher into memory, on the device where the model is trained; called at the first step that
            needs it, and the teacher is let go after the last one.
        divide: what makes a model part of a team's, where it is divided over processes.
        total_steps: steps of the whole training.
        pairs: as in ``Trainer``.

    Attributes:
        phase: what is distilled in the step that was prepared; None where nothing is.
    """

    def __init__(
        self,
        recipe: Distill,
        teacher: Callable[[], nn.Module],
        divide: Callable[[nn.Module], None],
        total_steps: int,
        pairs: PairLayout | None = None,
    ):
        self._recipe, self._load, self._divide, self._pairs = recipe, teacher, divide, pairs
        self._total_steps = total_steps
        self.phase: Phase | None = None
        self._teacher: nn.Module | None = None

    def prepare(self, step: int) -> None:
        """Choose what is distilled in a step, and have the teacher in memory where something is, and only there.

        Raises:
            IsotoneError: there is not enough memory for a second model.
        """
        self.phase = phase_at(self._recipe, step, self._total_steps)
        if self.phase is None:
            self._teacher = None
        elif self._teacher is None:
            try:
                teacher = self._load().eval().requires_grad_(False)
                self._divide(teacher)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise IsotoneError(
                    f"training.distill: not enough memory for a second model ({str(error).splitlines()[0]}); leave "
                    f"distillation out, or set training.parallel: fsdp in several processes"
                ) from error
            self._teacher = teacher

    def counts(self, ids_BL: Tensor) -> dict[str, int]:
        """Return how many tokens of a whole step are predicted, and how many each stack of blocks reads."""
        if self._pairs is None:
            rows, length = ids_BL.shape
            return {"predicted": rows * (length - 1), "read.0": rows * length}
        source_BS, target_BT = self._pairs.sides(ids_BL)
        num_target = int((target_BT != self._pairs.pad).sum())
        return {
            "predicted": num_target,
            "read.0": int((source_BS != self._pairs.pad).sum()),
            "read.1": num_target,
        }

    def losses(self, model: nn.Module, read_BL: Tensor, labels_BL: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
        """Return a micro-batch's part of a step's losses: ``loss``, which is trained on, and what it is made of.

        Args:
            model: what is trained.
            read_BL: what model and teacher read.
            labels_BL: the true tokens.
            counts: of the whole step.
        """
        weight, phase, found = self._recipe.weight, self.phase, dict[str, Tensor]()
        assert phase is not None  # prepare() has said so
        assert self._teacher is not None
        scored_BT, masks = self._masks(labels_BL)
        logits_wanted = phase == "logits" or weight < 1
        logits_BTV, states = self._pass(model, read_BL, logits_wanted, phase == "blocks")
        with torch.no_grad():
            teacher_BTV, teacher_states = self._pass(self._teacher, read_BL, phase == "logits", phase == "blocks")
        if logits_wanted:
            nll_BT = nll_of_logits(logits_BTV, self._labels(labels_BL), self._pairs)
            found["nll"] = nll_BT.sum() / counts["predicted"]
        if phase == "logits":
            kl_BT = token_kl(logits_BTV, teacher_BTV, self._recipe.temperature)
            found["logits"] = (kl_BT * scored_BT).sum() / counts["predicted"]
        else:
            centred = _ignores_mean(model)
            errors = [
                (state_error(own, its, centred) * mask_BL).sum() / counts[f"read.{stack}"]
                for stack, (own, its, mask_BL) in enumerate(zip(states, teacher_states, masks, strict=True))
            ]
            found["blocks"] = torch.stack(errors).mean()
        loss = weight * found[phase]
        return {"loss": loss + (1 - weight) * found["nll"] if weight < 1 else loss, **found}

    def _labels(self, labels_BL: Tensor) -> Tensor:
        return labels_BL[:, 1:] if self._pairs is None else self._pairs.sides(labels_BL)[1]

    def _masks(self, labels_BL: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return which predictions count, and which tokens of each stack do: padding does not."""
        if self._pairs is None:
            every_BL = torch.ones_like(labels_BL, dtype=torch.bool)
            return every_BL[:, 1:], [every_BL]
        source_BS, target_BT = (side != self._pairs.pad for side in self._pairs.sides(labels_BL))
        return target_BT, [source_BS, target_BT]

    def _pass(
        self, model: nn.Module, read_BL: Tensor, logits: bool, states: bool
    ) -> tuple[Tensor, list[Sequence[Tensor]]]:
        """Return the logits of predicted tokens [B, T, V], and the states after each block, by stack."""
        wanted: dict[str, Any] = {"use_cache": False, "output_hidden_states": states}
        if self._pairs is not None:
            found: Any = model(**self._pairs.inputs(model, read_BL), **wanted)
            stacks = [found.encoder_hidden_states, found.decoder_hidden_states] if states else []
        else:
            length = read_BL.shape[1]
            kept_T = torch.arange(length - 1 if logits else 1, device=read_BL.device)  # none at all is not to be had
            found = model(input_ids=read_BL, logits_to_keep=kept_T, **wanted)
            stacks = [found.hidden_states] if states else []
        return found.logits, [stack[1:] for stack in stacks]  # the first is the embedding


def state_error(states: Sequence[Tensor], teacher: Sequence[Tensor], centred: bool) -> Tensor:
    """Return ‖h − h*‖² / ‖h*‖² of every token, averaged over blocks, in fp32 [B, L].

    Args:
        states: h after each block [B, L, D]; the last one is behind the final norm.
        teacher: h*.
        centred: leave the mean over D out, but of the last one.
    """
    errors = []
    for number, (own_BLD, its_BLD) in enumerate(zip(states, teacher, strict=True), 1):
        difference_BLD, its_BLD = own_BLD.float() - its_BLD.float(), its_BLD.float()
        if centred and number < len(states):
            difference_BLD = difference_BLD - difference_BLD.mean(-1, keepdim=True)
            its_BLD = its_BLD - its_BLD.mean(-1, keepdim=True)
        errors.append(difference_BLD.square().sum(-1) / its_BLD.square().sum(-1).clamp_min(_LEAST))
    return torch.stack(errors).mean(0)


_LEAST = 1e-12
"""Least squared length of a teacher's state: none is 0, but one of a freshly made model may be."""


def _ignores_mean(model: nn.Module) -> bool:
    row = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return row is not None and row.norm == "layer_norm"
