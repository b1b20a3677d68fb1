"""Distillation: the first steps of a training teach a model what another one computes, before plain loss has its turn.

In the share ``blocks`` the directions of the states after each block are matched, which is what norms see of them:
‖n − n*‖² with n = h / ‖h‖, h* being the teacher's, averaged over blocks and tokens, and over the two stacks of an
encoder-decoder. (LayerNorms do not see a state's mean either: there it is left out.) It lies between 0 and 4, however
far a start has gone astray. In the share ``logits`` the predictions are matched: τ² KL(p*‖p) of each predicted token
at temperature τ (Hinton et al. 2015, 1503.02531). Which one it is depends on the step alone.

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
        read = [int(mask_BL.sum()) for mask_BL in _read(ids_BL, self._pairs)]
        predicted = read[-1] - (len(ids_BL) if self._pairs is None else 0)
        return {"predicted": predicted, **{f"read.{stack}": number for stack, number in enumerate(read)}}

    def losses(self, model: nn.Module, read_BL: Tensor, labels_BL: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
        """Return a micro-batch's part of a step's losses: ``loss``, which is trained on, and what it is made of.

        Args:
            model: what is trained.
            read_BL: what model and teacher read.
            labels_BL: the true tokens.
            counts: of the whole step.
        """
        weight, phase, pairs, found = self._recipe.weight, self.phase, self._pairs, dict[str, Tensor]()
        assert phase is not None  # prepare() has said so
        assert self._teacher is not None
        if pairs is not None:  # nothing edits a target
            pairs, read_BL = pairs.trimmed(read_BL)
            labels_BL = read_BL
        by_blocks, logits_wanted = phase == "blocks", phase == "logits" or weight < 1
        logits_BTV, states = _pass(model, read_BL, pairs, logits_wanted, by_blocks)
        with torch.no_grad():
            teacher_BTV, teacher_states = _pass(self._teacher, read_BL, pairs, not by_blocks, by_blocks)
        if logits_wanted:
            target_BT = labels_BL[:, 1:] if pairs is None else pairs.sides(labels_BL)[1]
            found["nll"] = nll_of_logits(logits_BTV, target_BT, pairs).sum() / counts["predicted"]
        if by_blocks:
            centred, masks = _ignores_mean(model), _read(labels_BL, pairs)
            errors = [
                (state_error(own, its, centred) * mask_BL).sum() / counts[f"read.{stack}"]
                for stack, (own, its, mask_BL) in enumerate(zip(states, teacher_states, masks, strict=True))
            ]
            found["blocks"] = torch.stack(errors).mean()
        else:
            kl_BT = token_kl(logits_BTV, teacher_BTV, self._recipe.temperature)
            predicted_BT = _read(labels_BL, pairs)[-1][:, -kl_BT.shape[1] :]
            found["logits"] = (kl_BT * predicted_BT).sum() / counts["predicted"]
        loss = weight * found[phase]
        return {"loss": loss + (1 - weight) * found["nll"] if weight < 1 else loss, **found}


def _pass(
    model: nn.Module, read_BL: Tensor, pairs: PairLayout | None, logits: bool, states: bool
) -> tuple[Tensor, list[Sequence[Tensor]]]:
    """Return the logits of predicted tokens [B, T, V], and the states after each block, by stack."""
    wanted: dict[str, Any] = {"use_cache": False, "output_hidden_states": states}
    if pairs is not None:
        found: Any = model(**pairs.inputs(model, read_BL), **wanted)
        stacks = [found.encoder_hidden_states, found.decoder_hidden_states] if states else []
    else:
        length = read_BL.shape[1]
        kept_T = torch.arange(length - 1 if logits else 1, device=read_BL.device)  # none at all is not to be had
        found = model(input_ids=read_BL, logits_to_keep=kept_T, **wanted)
        stacks = [found.hidden_states] if states else []
    return found.logits, [stack[1:] for stack in stacks]  # the first is the embedding


def _read(ids_BL: Tensor, pairs: PairLayout | None) -> list[Tensor]:
    """Return, by stack, which tokens it reads or, behind the last one, predicts: padding is none."""
    if pairs is None:
        return [torch.ones_like(ids_BL, dtype=torch.bool)]
    return [side != pairs.pad for side in pairs.sides(ids_BL)]


def state_error(states: Sequence[Tensor], teacher: Sequence[Tensor], centred: bool) -> Tensor:
    """Return ‖n − n*‖², n = h / ‖h‖, of every token, averaged over blocks, in fp32 [B, L].

    Args:
        states: h after each block [B, L, D]; the last one is behind the final norm.
        teacher: h*.
        centred: leave the mean over D out, but of the last one.
    """
    errors = []
    for number, pair in enumerate(zip(states, teacher, strict=True), 1):
        own_BLD, its_BLD = (h_BLD.float() for h_BLD in pair)
        if centred and number < len(states):
            own_BLD, its_BLD = (h_BLD - h_BLD.mean(-1, keepdim=True) for h_BLD in (own_BLD, its_BLD))
        own_BLD, its_BLD = (nn.functional.normalize(h_BLD, dim=-1) for h_BLD in (own_BLD, its_BLD))
        errors.append((own_BLD - its_BLD).square().sum(-1))
    return torch.stack(errors).mean(0)


def _ignores_mean(model: nn.Module) -> bool:
    row = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return row is not None and row.norm == "layer_norm"
