"""What follows from all arms together: decompositions, signs of masking and verdicts, for one seed or several alike."""

from collections.abc import Mapping
from dataclasses import dataclass

from isotone.decomposition import Decomposition, Pair, accounts, published_gaps
from isotone.evidence import WORST, AttackKey, Seeds
from isotone.masking import Masking, diagnose
from isotone.robustness import Floors, Verdict, decide

PUBLISHED: AttackKey = ("hotflip", "published")
"""The attack that published figures are about."""


@dataclass(frozen=True)
class Analysis:
    """What follows; arms in the order of the experiment.

    Attributes:
        decompositions: of the published figures, and of the primary gap through each matched-loss control.
        masking: by arm.
        verdicts: one an arm that is neither the baseline nor a matched-loss control.
    """

    decompositions: list[Decomposition]
    masking: dict[str, Masking]
    verdicts: list[Verdict]


def analyse(
    seeds: Seeds,
    baseline: str,
    primary: AttackKey,
    margins: Mapping[str, float],
    published_success: float,
    floors: Floors,
) -> Analysis:
    """Compare every arm with the baseline and with its own controls.

    Args:
        seeds: evidence by arm, of each seed; the same arms in all.
        baseline: the arm without a constraint; without it nothing follows.
        primary: the attack whose edits are transferred.
        margins: δ by attack; without the ensemble's own, HotFlip's is taken: one member's, so not a wider one.
        published_success: share of the clean loss that published accounting calls a success.
        floors: what must have been measured at least for a verdict.
    """
    found = Analysis([], {}, [])
    if not seeds or not all(baseline in of_seed for of_seed in seeds):
        return found
    margin = margins.get(WORST[0], margins.get("hotflip"))
    for arm in seeds[0]:
        if arm == baseline or seeds[0][arm].matched or not all(arm in of_seed for of_seed in seeds):
            continue
        found.decompositions.extend(_published(arm, baseline, seeds, published_success))
        found.masking[arm] = diagnose(arm, baseline, seeds, primary)
        verdict, gaps = decide(arm, baseline, seeds, margin, found.masking[arm], floors)
        found.decompositions.extend(gaps)
        found.verdicts.append(verdict)
    return found


def _published(arm: str, baseline: str, seeds: Seeds, published_success: float) -> list[Decomposition]:
    rows = {name: [of_seed[name].attacks.get(PUBLISHED, ()) for of_seed in seeds] for name in (baseline, arm)}
    if not all(of_seed for of_arm in rows.values() for of_seed in of_arm):
        return []
    of_baseline, of_arm = ([accounts(r, published_success) for r in rows[name]] for name in (baseline, arm))
    return published_gaps(Pair(arm, baseline, PUBLISHED), of_baseline, of_arm, published_success)
