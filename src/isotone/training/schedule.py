"""The learning rate of every step: a linear warmup, then a cosine or linear decay, as a pure function of the step."""

import math
from fractions import Fraction

from isotone.config import Training


def learning_rate(recipe: Training, step: int, total_steps: int) -> float:
    """Return the rate of one optimizer step.

    The horizon is the whole target, whatever part of it one process trains. No step has rate 0: the first is
    peak / warmup steps, the last one above the schedule's end.

    Args:
        recipe: peak ``lr``, ``warmup`` share, ``schedule`` and ``min_lr_ratio``.
        step: number of the step, from 0.
        total_steps: steps of the whole training.
    """
    num_warmup = math.ceil(Fraction(str(recipe.warmup)) * total_steps)
    if step < num_warmup:
        return recipe.lr * (step + 1) / num_warmup
    done = (step - num_warmup) / (total_steps - num_warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
    return recipe.lr * (recipe.min_lr_ratio + (1 - recipe.min_lr_ratio) * share)
