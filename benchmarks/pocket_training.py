"""How the bundled models are trained: Muon and AdamW, a schedule that stays and then falls, an average of the weights.

The hidden matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; what is kept is an exponential
moving average. A killed run continues from its last epoch.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10, help="the schedule's end")
    parser.add_argument("--stop-after", type=int, help="stop before it, with the average of the weights so far")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's; Muon's is .02")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)


def train(
    model: PreTrainedModel,
    is_hidden: Callable[[str], bool],
    batches: Callable[[int], Iterator[Batch]],
    per_epoch: int,
    loss: Callable[[Batch], Tensor],
    validate: Callable[[], float],
    args: argparse.Namespace,
) -> None:
    """Train, and leave the model with the average of its weights, in bf16 as it is stored and measured.

    Args:
        model: with random weights.
        is_hidden: whether a matrix of this name is Muon's.
        batches: those of an epoch, which depend on its number alone.
        per_epoch: how many there are.
        loss: mean nats of a batch.
        validate: mean nats of the validation split, of the model as it is.
        args: of ``add_arguments``.
    """
    named = list(model.named_parameters())
    hidden = [p for n, p in named if p.ndim == 2 and is_hidden(n)]
    other = [p for n, p in named if not (p.ndim == 2 and is_hidden(n))]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    total, warmup = per_epoch * args.epochs, 100
    average = [p.detach().clone() for p in model.parameters()]
    state, first = args.out / "unfinished.pt", 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        for optimizer, s in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(s)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        average, first = saved["average"], saved["epoch"]
    started = time.monotonic()
    for epoch in range(first, args.stop_after or args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)  # dropout; an epoch does not depend on the ones before it
        model.train()
        for k, batch in enumerate(batches(epoch)):
            step = epoch * per_epoch + k
            scale = min((step + 1) / warmup, 1.0) * (1 - max(0.0, (step - 0.3 * total) / (0.7 * total)) * 0.99)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            with torch.autocast("cpu", torch.bfloat16):
                nats = loss(batch)
            nats.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                decay = min(0.995, (step + 1) / (step + 10))
                for mean, parameter in zip(average, model.parameters(), strict=True):
                    mean.lerp_(parameter, 1 - decay)
            if k % 50 == 0:
                seconds = time.monotonic() - started
                print(f"step {step}/{total} loss {nats.item():.3f} {seconds:.0f} s", flush=True)
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "average": average,
                "epoch": epoch + 1,
            },
            state.with_suffix(".new"),
        )
        state.with_suffix(".new").replace(state)
        live = [p.detach().clone() for p in model.parameters()]
        _fill(model, average)
        found = validate()
        _fill(model, live)
        print(f"epoch {epoch + 1} validation {found:.4f} nats a token, perplexity {math.exp(found):.2f}", flush=True)
    state.unlink()
    _fill(model, [mean.to(torch.bfloat16) for mean in average])
    model.eval()


@torch.no_grad()
def _fill(model: PreTrainedModel, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)
