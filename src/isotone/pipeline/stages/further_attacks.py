"""Stage 6: one further attack on one arm, on the same documents as HotFlip; which one, the node's kind says.

An attack on texts also attacks the search documents of the baseline: a tenth of what it does there is the margin of
equivalence.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotone import records
from isotone.attacks import GCG, CoordinateSearch, EmbeddingPGD, FrequencyEdits, run_documents, token_counts
from isotone.attacks.interface import DocumentAttack
from isotone.attacks.protocol import Document
from isotone.config import Attacks
from isotone.data.packed import open_packed
from isotone.pairs import PairLayout
from isotone.pipeline.arms import attack_protocol, attack_vocabulary, attacked_windows, first_token, load_end
from isotone.pipeline.context import Context

SEARCH = "search"
"""Names the rows of the search documents."""


def run(context: Context) -> list[Path]:
    """Attack the held-out documents, and on the baseline the search documents too."""
    config, data = context.experiment.attacks, open_packed(context.run.data)
    model = load_end(context, context.arm_name, config.checkpoint)
    vocabulary, protocol = attack_vocabulary(context, model), attack_protocol(context)
    documents = data.documents("attack_search")
    attack = further_attack(
        config, context.node.kind, context.seed, documents, len(vocabulary.admissible_V), data.pairs
    )
    splits: dict[str, str | None] = {"attack_test": None}
    if context.arm_name == "baseline" and not attack.upper_bound:
        splits["attack_search"] = SEARCH
    outputs, counts = list[Path](), dict[str, Any]()
    for split, name in splits.items():
        windows, num_short = attacked_windows(context, data, split, first_token(context))
        counts[split] = {"attacked": len(windows), "too_short": num_short}
        outputs.append(context.run.documents(context.node, name))
        with context.progress(len(windows), "document") as bar:
            run_documents(
                attack,
                model,
                vocabulary,
                windows,
                protocol,
                log=records.JsonLines(outputs[-1]),
                stop=context.stop,
                batch_documents=config.batch_documents,
                progress=bar.set,
            )
    result = context.run.node_result(context.node)
    records.write_json(result, {"schema": 1, "arm": context.arm_name, "attack": repr(attack), "documents": counts})
    return [*outputs, result]


def further_attack(
    config: Attacks,
    kind: str,
    seed: int,
    search_documents: Iterable[Document],
    num_embeddings: int,
    pairs: PairLayout | None = None,
) -> DocumentAttack:
    """Return a further attack as configured.

    Args:
        config: the attacks of the experiment.
        kind: gcg, coordinate, pgd or frequency.
        seed: of the run.
        search_documents: frequencies are counted in them.
        num_embeddings: rows of the model's embedding.
        pairs: how the documents' rows are divided, if they are pairs.
    """
    flips, budget = config.hotflip.flips, config.budget_tokens
    if (gcg := config.gcg) is not None and kind == "gcg":
        return GCG(flips, gcg.top_k, gcg.candidates, gcg.steps, budget_tokens=budget, seed=seed)
    if (coordinate := config.coordinate) is not None and kind == "coordinate":
        values = (flips, coordinate.candidates, coordinate.rounds)
        return CoordinateSearch(*values, budget_tokens=budget, seed=seed, proposals=coordinate.proposals)
    if (pgd := config.pgd) is not None and kind == "pgd":
        return EmbeddingPGD(flips, pgd.steps, pgd.radius, budget_tokens=budget)
    if (frequency := config.frequency) is not None and kind == "frequency":
        counts_V = token_counts(search_documents, num_embeddings, pairs)
        return FrequencyEdits(flips, frequency.draws, seed=seed, counts_V=counts_V)
    raise AssertionError(f"attacks.{kind} is not configured")
