"""Stage 6: HotFlip on one arm, in every method asked for, with the published attack and random edits beside it.

The methods also attack the search documents of the baseline: a tenth of what they do there is the margin of
equivalence.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from isotone import records
from isotone.attacks import (
    BeamHotFlip,
    HotFlip,
    PublishedHotFlip,
    RandomEdits,
    ShuffledHotFlip,
    Vocabulary,
    run_documents,
)
from isotone.attacks.exchange import exchange_contexts
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.protocol import AttackProtocol
from isotone.attacks.running import edited, edits_of
from isotone.config import Attacks, Experiment
from isotone.constraint.premise import premise_met
from isotone.data.packed import open_packed
from isotone.evidence import EXCHANGED
from isotone.pipeline.arms import attack_protocol, attack_vocabulary, attacked_windows, first_token, load_end
from isotone.pipeline.context import Context
from isotone.progress import ProgressBar
from isotone.results import primary_variant


def run(context: Context) -> list[Path]:
    """Attack the held-out documents with every method, and the search documents at random for the success threshold."""
    config, data = context.experiment.attacks, open_packed(context.run.data)
    model = load_end(context, context.arm_name, config.checkpoint)
    vocabulary, protocol = attack_vocabulary(context, model), attack_protocol(context)
    outputs, documents = list[Path](), dict[str, Any]()
    for variant, (split, attack) in attacks(context.experiment, context.seed, context.arm_name).items():
        windows, num_short = attacked_windows(context, data, split, first_token(context))
        documents[split] = {"attacked": len(windows), "too_short": num_short}
        path = context.run.documents(context.node, variant)
        with context.progress(len(windows), "document") as bar:
            run_documents(
                attack,
                model,
                vocabulary,
                windows,
                protocol,
                log=records.JsonLines(path),
                stop=context.stop,
                batch_documents=config.batch_documents,
                progress=partial(_show, bar, variant),
            )
        outputs.append(path)
    outputs.append(_exchange(context, model, protocol, vocabulary))
    found = {"documents": documents, "premise": _premise(context, model, protocol)}
    records.write_json(context.run.node_result(context.node), {"schema": 1, "arm": context.arm_name, **found})
    return [*outputs, context.run.node_result(context.node)]


def _exchange(context: Context, model: PreTrainedModel, protocol: AttackProtocol, vocabulary: Vocabulary) -> Path:
    """Measure how much the arm reads what is attacked."""
    path = context.run.documents(context.node, EXCHANGED)
    windows, _ = attacked_windows(context, open_packed(context.run.data), "attack_test", first_token(context))
    exchange_contexts(
        model,
        vocabulary,
        windows,
        protocol,
        log=records.JsonLines(path),
        stop=context.stop,
        batch_documents=context.experiment.attacks.batch_documents,
    )
    return path


def _premise(context: Context, model: PreTrainedModel, protocol: AttackProtocol) -> dict[str, Any]:
    """Return how often the texts that the primary method left meet the premise of a certificate."""
    variant, data = primary_variant(context.experiment), open_packed(context.run.data)
    edits = edits_of(records.JsonLines(context.run.documents(context.node, variant)).read())
    windows, _ = attacked_windows(context, data, "attack_test", first_token(context))
    texts = [(torch.from_numpy(w.tokens), edited(w, edits[w.id])) for w in windows if w.id in edits]
    clean, attacked = ([pair[side] for pair in texts] for side in (0, 1))
    return {"variant": variant, **premise_met(model, clean, attacked, protocol.pairs)}


def _show(bar: ProgressBar, variant: str, done: int, total: int) -> None:
    bar.update(done, variant)


def attacks(experiment: Experiment, seed: int, arm: str) -> dict[str, tuple[str, DocumentAttack]]:
    """Return every attack of the stage on an arm by variant, with the split that it attacks."""
    config = experiment.attacks
    methods: dict[str, DocumentAttack] = {method: _method(config, method, seed) for method in config.hotflip.methods}
    found: dict[str, tuple[str, DocumentAttack]] = {
        method: ("attack_test", attack) for method, attack in methods.items()
    }
    found["published"] = ("attack_test", PublishedHotFlip(flips=config.hotflip.flips))
    random = RandomEdits(flips=config.hotflip.flips, draws=config.random_draws, seed=seed)
    found["random"] = ("attack_test", RandomEdits(flips=config.hotflip.flips, draws=1, seed=seed))
    found["random_search"] = ("attack_search", random)
    if arm == "baseline":
        found |= {f"{method}_search": ("attack_search", attack) for method, attack in methods.items()}
    return found


def _method(config: Attacks, method: str, seed: int) -> DocumentAttack:
    flips, candidates, budget = config.hotflip.flips, config.hotflip.candidates, config.budget_tokens
    match method:
        case "once":
            return HotFlip(flips=flips, method="once", candidates=candidates)
        case "iterative":
            return HotFlip(flips=flips, candidates=candidates, budget_tokens=budget)
        case "beam":
            width = config.hotflip.beam_width
            return BeamHotFlip(flips=flips, width=width, candidates=candidates, budget_tokens=budget)
        case "shuffled":
            return ShuffledHotFlip(flips=flips, candidates=candidates, budget_tokens=budget, seed=seed)
    raise AssertionError(method)
