"""AdamW over what is trained, and its state as named tensors."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from isotone.config import Training
from isotone.records import CorruptError

_FUSED_DEVICES = ("cpu", "cuda", "mps")


def build_optimizer(
    trainable: Mapping[str, nn.Parameter], recipe: Training, undecayed: Collection[str] = ()
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 1711.05101) with its state allocated.

    Matrices decay; vectors do not, nor do constrained masters, which decay would pull to softplus(0) = 0.69 and not
    to 0. State is allocated here and not in the first step, so that a lack of memory shows before any weight moves.

    Args:
        trainable: what is trained, by name.
        recipe: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        undecayed: names of matrices that do not decay.
    """
    decayed = {name for name, parameter in trainable.items() if parameter.ndim >= 2 and name not in undecayed}
    groups = [
        {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in _FUSED_DEVICES for p in trainable.values())
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused, foreach=not fused
    )
    for parameter in trainable.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the whole state as tensors named PARAMETER.FIELD, such as ``lm_head.weight.exp_avg``."""
    return {
        f"{name}.{field}": value
        for name, parameter in trainable.items()
        for field, value in optimizer.state[parameter].items()
    }


@torch.no_grad()
def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Copy a saved state into a built optimizer.

    Raises:
        CorruptError: a tensor is missing, unknown or of another shape.
    """
    copy_into(optimizer_tensors(optimizer, trainable), tensors, "the optimizer's state")


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors into existing ones of the same names, shapes and dtypes.

    Raises:
        CorruptError: names the first tensor that does not fit; nothing was copied.
    """
    for name in targets.keys() | saved.keys():
        if name not in saved or name not in targets:
            raise CorruptError(f"{what}: {name} is {'missing' if name in targets else 'unknown to this model'}")
        if (saved[name].shape, saved[name].dtype) != (targets[name].shape, targets[name].dtype):
            raise CorruptError(
                f"{what}: {name} is {saved[name].dtype} {list(saved[name].shape)}, "
                f"expected {targets[name].dtype} {list(targets[name].shape)}"
            )
    for name, target in targets.items():
        target.copy_(saved[name])
