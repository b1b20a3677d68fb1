"""Which part of the configuration a node depends on: what is hashed into its record, with defaults left out.

A value that cannot change a node's result (how often to save, what to log) is in no slice, so a change of it makes
nothing stale. Nor is how many processes share the work, and how: like the micro-batch's, its history is kept beside the
checkpoints, and a training goes on with another number of them.
"""

from typing import Any

from pydantic import BaseModel

from isotone.config import NO_ARMS, Experiment
from isotone.pipeline.graph import FURTHER_ATTACKS, PROBE, Node

_OF_ONE_ATTACK = {"hotflip", "triggers", *FURTHER_ATTACKS, PROBE, "transfer"}
"""Parts of ``attacks`` that are read by one kind of node."""

_NOT_REPLAYED = {"pgd", "frequency", PROBE}
"""Parts of ``attacks`` that find no edits which another arm is asked about."""

_PROBED = {PROBE, "protocol", "num_documents", "checkpoint"}
"""What of ``attacks`` a probe depends on: no other attack's size, no batch of documents, no search document."""

_MATCHED_BY = {"protocol", "num_documents", "batch_documents", "checkpoint"}
"""What of ``attacks`` a matched loss depends on: where it is measured, and which checkpoints are meant."""

_HARMLESS_TRAINING = {"save_every_steps", "save_every_minutes", "keep_last", "parallel"}


def config_slice(experiment: Experiment, seed: int, node: Node) -> dict[str, Any]:
    """Return what a node uses of the resolved experiment, as JSON."""
    attacks = experiment.attacks
    match node.kind:
        case "setup":
            return {"model": _given(experiment.model), "data": _given(experiment.data)}
        case "constrain":
            constraint = experiment.arms[_arm(node)].constraint
            drawn = {"seed": seed} if experiment.arms[_arm(node)].start == "random" else {}
            start = _start(experiment, node)
            return {"constraint": _given(constraint), "start": start, **drawn, **_machine(experiment)}
        case "train":
            return {
                **_training(experiment, _arm(node)),
                "start": _start(experiment, node),
                "seed": seed,
                **_machine(experiment),
            }
        case "match":
            return {
                **_matched(experiment, _arm(node)),
                "start": _start(experiment, node),
                "attacks": {k: v for k, v in _given(attacks).items() if k in _MATCHED_BY},
                "measured_on": "attack_test",
                "seed": seed,
                **_usable_pairs(experiment),
                **_documents(experiment),
                **_machine(experiment),
            }
        case "evaluate":
            chosen = {"evaluation": _given(experiment.evaluation), "primary": attacks.checkpoint}
            return {**chosen, **_documents(experiment), **_machine(experiment)}
        case "hotflip" | "triggers":
            other = (_OF_ONE_ATTACK - {node.kind}) | ({"budget_tokens"} if node.kind == "triggers" else set())
            chosen = {k: v for k, v in _given(attacks).items() if k not in other}
            part = {"attacks": chosen, "seed": seed, **_documents(experiment), **_machine(experiment)}
            return part if node.kind == "hotflip" else part | _usable_pairs(experiment)
        case kind if kind in FURTHER_ATTACKS:
            chosen = {k: v for k, v in _given(attacks).items() if k not in _OF_ONE_ATTACK - {kind}}
            part = {"attacks": chosen, "flips": attacks.hotflip.flips, "seed": seed}
            return {**part, **_documents(experiment), **_machine(experiment)}
        case "probe":
            chosen = {k: v for k, v in _given(attacks).items() if k in _PROBED}
            part = {"attacks": chosen, "seed": seed, **_documents(experiment), **_machine(experiment)}
            return part | _usable_pairs(experiment)
        case "transfer":
            replayed = {k: v for k, v in _given(attacks).items() if k not in _NOT_REPLAYED}
            return {"attacks": replayed, "seed": seed, **_documents(experiment), **_machine(experiment)}
        case "aggregate":
            return {
                "arms": {name: _given(arm) for name, arm in experiment.arms.items()},
                "training": {k: v for k, v in _given(experiment.training).items() if k not in _HARMLESS_TRAINING},
                "attacks": _given(attacks),
                **({"analysis": declared} if (declared := _given(experiment.analysis)) else {}),
                "seed": seed,
            }
    raise AssertionError(f"no slice for {node}")


def _training(experiment: Experiment, arm: str) -> dict[str, Any]:
    """Return what decides an arm's training but for where it starts; what is at its default is in no record."""
    recipe, config = experiment.training_of(arm), experiment.arms[arm]
    found: dict[str, Any] = {"training": {k: v for k, v in _given(recipe).items() if k not in _HARMLESS_TRAINING}}
    if recipe.random_prefix:
        found["prefix"] = experiment.attacks.protocol.source or experiment.attacks.protocol.prefix
    if config.constraint and not config.held:  # no node of its own has answered for where it starts
        found["constraint"] = _given(config.constraint)
    return found


def _matched(experiment: Experiment, arm: str) -> dict[str, Any]:
    config, matched = experiment.arms[arm], experiment.arms[arm].matched_loss
    assert matched is not None  # the graph has this node for matched arms only
    target = experiment.arms[matched.to].constraint
    found: dict[str, Any] = {"matched_loss": _given(matched)}
    if matched.by == "noise" and target:
        found["scope"] = target.scope
        found |= {"layers": target.layers} if target.layers is not None else {}
    if matched.by == "undertrained":
        found |= _training(experiment, config.start)
    return found


def _given(part: BaseModel | None) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True) if part else {}


def _arm(node: Node) -> str:
    assert node.arm is not None
    return node.arm


def _start(experiment: Experiment, node: Node) -> dict[str, str]:
    start = experiment.arms[_arm(node)].start
    return {"arm": start} if start in NO_ARMS else {"arm": start, "checkpoint": experiment.attacks.checkpoint}


def _usable_pairs(experiment: Experiment) -> dict[str, Any]:
    """Return what decides which pairs are attacked beside the protocol: a source has as many tokens as are flipped."""
    return {"flips": experiment.attacks.hotflip.flips} if experiment.attacks.protocol.source is not None else {}


def _documents(experiment: Experiment) -> dict[str, Any]:
    """Return what decides which held-out documents are taken; nothing at its default, which no record names."""
    seed = experiment.data.shuffle_seed
    return {"shuffle_seed": seed} if seed else {}


def _machine(experiment: Experiment) -> dict[str, Any]:
    """Return what of the machine decides the bits: device kind, threads and kernel."""
    runtime = experiment.runtime
    return {"device": runtime.device, "threads": runtime.threads, "attention": experiment.model.attention}
