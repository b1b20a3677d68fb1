"""What attacks have to do, on one arm: forwards and gradients, counted as the attacks themselves spend them."""

from dataclasses import dataclass

from isotone.config import Triggers
from isotone.planning.flops import forward_flops, gradient_flops
from isotone.planning.sizes import Sizes, Work

SKIPPED = 16
"""First tokens of a text that triggers do not score; as in attacks/triggers.py."""

CONTROLS = 16
"""Other sequences that stand in a trigger's place, for each document; as in attacks/trigger_rows.py."""


def hotflip(sizes: Sizes, arm: str) -> Work:
    """Return the attack operations of HotFlip on one arm: every method, published and random edits beside it."""
    config, shape, costs = sizes.experiment.attacks, sizes.shape, _costs(sizes)
    flips, length = config.hotflip.flips, config.protocol.length
    tests, searches = _attacked(sizes)
    width, gradients = config.hotflip.beam_width, {"once": 1, "iterative": flips, "shuffled": flips}
    gradients["beam"] = 1 + (flips - 1) * width
    total = 0.0
    for method in config.hotflip.methods:
        candidates = 0 if method == "once" else flips * config.hotflip.candidates
        if config.budget_tokens is not None and method != "once":
            candidates = config.budget_tokens // length - 3 * gradients[method]
        one = gradients[method] * costs.gradient + candidates * costs.candidate + costs.judged
        total += (tests + (searches if arm == "baseline" else 0)) * one
    total += tests * (gradient_flops(shape, 1, length, length - 1) + 2 * flips * shape.head_weights + costs.judged)
    total += tests * (2 * costs.clean + costs.judged)
    total += tests * costs.judged  # another document's context
    total += searches * ((1 + config.random_draws) * costs.clean + costs.judged)
    # the stage asks the tokenizer for its BOS before every method, published and both random ones included
    return Work(attack=total, tokenizers=1 + len(methods_used(sizes, arm)), vocabularies=1)


def methods_used(sizes: Sizes, arm: str) -> tuple[str, ...]:
    """Return the variants that HotFlip's stage runs on an arm (pipeline/stages/hotflip.py)."""
    methods: tuple[str, ...] = sizes.experiment.attacks.hotflip.methods
    on_search = tuple(f"{method}_search" for method in methods) if arm == "baseline" else ()
    return (*methods, "published", "random", "random_search", *on_search)


def further_attack(sizes: Sizes, kind: str, arm: str) -> Work:
    """Return the attack operations of one further attack on one arm (pipeline/stages/further_attacks.py)."""
    config, costs = sizes.experiment.attacks, _costs(sizes)
    lengths = None if config.budget_tokens is None else config.budget_tokens // config.protocol.length
    one = 0.0
    if kind == "gcg" and (gcg := config.gcg) is not None:
        steps = gcg.steps if lengths is None else lengths // (3 + gcg.candidates)
        one = steps * (costs.gradient + gcg.candidates * costs.candidate) + costs.judged
    elif kind == "coordinate" and (coordinate := config.coordinate) is not None:
        rounds = coordinate.rounds if lengths is None else (lengths - 1) // coordinate.candidates
        one = rounds * (costs.clean + coordinate.candidates * costs.candidate) + costs.judged
    elif kind == "pgd" and (pgd := config.pgd) is not None:
        one = (pgd.steps if lengths is None else lengths // 3) * costs.gradient + costs.judged
    elif kind == "frequency" and (frequency := config.frequency) is not None:
        one = (1 + frequency.draws) * costs.clean + costs.judged
    tests, searches = _attacked(sizes)
    splits = 2 if arm == "baseline" and kind != "pgd" else 1
    return Work(attack=(tests + (splits - 1) * searches) * one, tokenizers=1 + splits, vocabularies=1)


def probe(sizes: Sizes) -> Work:
    """Return the operations of probing one arm (pipeline/stages/probe.py): a gradient, and a forward for each edit."""
    experiment, shape = sizes.experiment, sizes.shape
    config, protocol = experiment.attacks.probe, experiment.attacks.protocol
    assert config is not None  # the graph has this node where the part is there
    tried = min(shape.vocabulary, config.oracle_tokens or shape.vocabulary)
    one = gradient_flops(shape, 1, protocol.length, protocol.num_scored) + 2 * (config.edits + tried) * shape.hidden
    one += (config.edits + tried) * _costs(sizes).candidate
    return Work(attack=min(config.num_documents, _attacked(sizes)[0]) * one, tokenizers=2, vocabularies=1)


def transfer(sizes: Sizes) -> Work:
    """Return the operations of replaying all other arms' edits and triggers on one (pipeline/stages/transfer.py)."""
    config, others = sizes.experiment.attacks, len(sizes.experiment.arms) - 1
    replayed = len(config.hotflip.methods) + sum(part is not None for part in (config.gcg, config.coordinate))
    tests, _ = _attacked(sizes)
    total = others * (replayed + 1) * tests * _costs(sizes).judged  # a trigger: clean, attacked and its start
    return Work(attack=total, tokenizers=1 + others * replayed, vocabularies=1)


@dataclass(frozen=True)
class _Costs:
    """Operations of one text: a gradient with the ranking by it, a candidate, a forward, the judge."""

    gradient: float
    candidate: float
    clean: float
    judged: float


def _costs(sizes: Sizes) -> _Costs:
    protocol, shape = sizes.experiment.attacks.protocol, sizes.shape
    length, scored = protocol.length, protocol.num_scored
    gains = 2 * protocol.num_attackable * shape.head_weights
    # candidates read what stands before their edit from the cache, where there is one: half of the prefix in the mean
    cached = 0 if sizes.experiment.data.pairs else protocol.prefix / 2
    judged = scored if sizes.experiment.data.pairs else length - 1
    clean = forward_flops(shape, 1, length, scored)
    return _Costs(
        gradient=gradient_flops(shape, 1, length, scored) + gains,
        candidate=forward_flops(shape, 1, length - cached, scored, before=cached),
        clean=clean,
        judged=2 * forward_flops(shape, 1, length, judged) + clean,  # and once more as decoded and encoded text
    )


def _attacked(sizes: Sizes) -> tuple[int, int]:
    """Return how many held-out and how many search documents are attacked."""
    config = sizes.experiment.attacks
    tests = sizes.num_documents("attack_test", config.num_documents, config.protocol.length)
    return tests, sizes.num_documents("attack_search", config.num_search_documents, config.protocol.length)


def trigger_length(sizes: Sizes) -> int:
    """Return the tokens of a text behind a trigger, with BOS before both."""
    config = sizes.experiment.attacks
    return min(sizes.shape.context - config.triggers.length - 1, config.protocol.length)


def trigger_iterations(sizes: Sizes) -> int:
    """Return the iterations of one restart: as asked for, or what the budget buys (attacks/triggers.py)."""
    config = sizes.experiment.attacks.triggers
    if config.budget_tokens is None:
        return config.iterations
    length, searches = 1 + config.length + trigger_length(sizes), _searches(sizes)
    batch = min(config.batch_size, searches)
    iteration = (_standing(config) + config.candidates) * batch * length
    affordable = (config.budget_tokens // config.restarts - 2 * searches * length) // max(1, iteration)
    return max(1, min(config.iterations, affordable))


def trigger_tokens(sizes: Sizes) -> int:
    """Return the tokens that a whole search spends, counted as attacks/budget.py counts them."""
    config, searches = sizes.experiment.attacks.triggers, _searches(sizes)
    length, batch = 1 + config.length + trigger_length(sizes), min(config.batch_size, searches)
    iterations = trigger_iterations(sizes) * (_standing(config) + config.candidates) * batch
    return config.restarts * length * (iterations + 2 * searches)


def triggers(sizes: Sizes) -> Work:
    """Return the attack operations of stage 5 for one arm: the search, and what the best is worth on held-out texts."""
    config, shape = sizes.experiment.attacks, sizes.shape
    text, searches = trigger_length(sizes), _searches(sizes)
    tests = sizes.num_documents("attack_test", config.num_documents, config.protocol.length)
    length, scored = 1 + config.triggers.length + text, text - SKIPPED
    batch = min(config.triggers.batch_size, searches)
    forward = forward_flops(shape, 1, length, scored)
    iteration = batch * (config.triggers.candidates + 1) * forward
    if config.triggers.proposals == "gradient":
        iteration += batch * (gradient_flops(shape, 1, length, scored) - forward)
        iteration += 2 * config.triggers.length * shape.head_weights
    restart = trigger_iterations(sizes) * iteration + 2 * searches * forward
    judged = 2 * forward_flops(shape, 1, length, length - 1) + (1 + CONTROLS) * forward
    attack = config.triggers.restarts * restart + searches * forward + tests * judged
    return Work(attack=attack, tokenizers=1, vocabularies=1)


def _standing(config: Triggers) -> int:
    """Return the forwards that a look at the trigger as it stands counts as: with a gradient, or without."""
    return 3 if config.proposals == "gradient" else 1


def _searches(sizes: Sizes) -> int:
    config = sizes.experiment.attacks
    return sizes.num_documents("attack_search", config.num_search_documents, config.protocol.length)
