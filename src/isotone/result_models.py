"""The form of the result files. Their JSON schemas, in ``isotone/schemas``, are made from these classes.

python -m isotone.result_models    writes the schemas anew
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from isotone import records
from isotone.decomposition import Decomposition
from isotone.masking import Masking
from isotone.robustness import Verdict
from isotone.verdict import Conclusion

SCHEMA = 1
"""Number of the form, in every result file; a breaking change raises it."""

SCHEMA_FOLDER = Path(__file__).parent / "schemas"

Interval = Annotated[list[float], Field(min_length=2, max_length=2)] | None


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class FamilyMember(_Result):
    """What the configuration declares as confirmatory, of every arm against the baseline."""

    metric: str
    attack: str | None
    variant: str | None
    protocol: str | None
    num_comparisons: int
    """0: declared, but not measured."""


class _Figure(_Result):
    """One figure of one arm."""

    arm: str
    metric: str
    attack: str | None
    variant: str | None
    protocol: str | None
    """prefix (primary), prefix_text_space, after_first_flip (secondary), published; None: nothing is attacked."""
    budget: float | None
    """Tokens spent a document (by a trigger: in its whole search), counted as if nothing were cached."""
    threshold: float | None
    """Nats per scored token above which a document counts as a success."""
    n: int
    """Documents with a figure."""
    num_missing: int
    """Documents without one."""
    value: float | None
    ci95: Interval
    unit: str


class Measurement(_Figure):
    """One figure of one arm and seed; everything else in the results is derived from these."""

    seed: int


class PooledMeasurement(_Figure):
    """One figure of one arm over all seeds, on the documents that have figures in every seed."""

    num_seeds: int


class Comparison(_Result):
    """Two arms on the same documents; ``difference`` is a − b."""

    metric: str
    attack: str | None
    variant: str | None
    protocol: str | None
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    ci95: Interval
    ci90: Interval
    p: float | None
    p_adjusted: float | None
    """After Holm's correction over the confirmatory family; None outside of it."""
    family: str
    """confirmatory or exploratory."""
    level: float | None = None
    """Level at which ``p_adjusted`` is read; None outside of the confirmatory family."""
    effect_size: float | None
    """Mean over standard deviation of the documents' differences (paired d)."""
    test: str
    n: int
    num_missing: int
    num_seeds: int
    scope: str
    """What the interval speaks about."""
    se: float | None
    dof: float | None
    detectable: float | None
    """Smallest difference that would probably have been found: 2.8·se."""
    p_sign_flip: float
    """Randomization check of p; it flips documents, so over several seeds too it speaks of these models only."""
    threshold: float | None
    unit: str
    only_a: int | None = None
    """Documents in which only a is a success."""
    only_b: int | None = None


class Transfer(_Result):
    """What edits or a trigger found on one arm do to another: a cell of the transfer matrix, its diagonal included."""

    source: str
    """The arm that was attacked."""
    target: str
    """The arm that was asked."""
    attack: str
    variant: str
    protocol: str
    n: int
    num_missing: int
    value: float | None
    """Σ change of nats over Σ scored tokens."""
    ci95: Interval
    unit: str


class PooledTransfer(Transfer):
    """The same over all seeds, on the documents that have figures in every seed."""

    num_seeds: int


class ArmResult(_Result):
    """The figures of one arm in one place."""

    perplexity: float | None
    bits_per_byte: float | None
    evaluation: dict[str, Any]
    """By checkpoint: nll, perplexity and bits_per_byte with intervals, and what was left out; with ``rouge``: each
    measure, and the same of the source itself under ``source_copied``."""
    hotflip: dict[str, Any] | None
    """The primary variant's entry, and every variant's under ``variants``."""
    triggers: dict[str, Any] | None
    attacks: dict[str, Any] = {}
    """By name: entries of further attacks, and of the ensemble, the worst case of all attacks on text."""
    certificate: dict[str, Any] | None
    training: dict[str, Any] | None
    """None for an arm that is not trained."""
    matched_loss: dict[str, Any] | None = None
    """Of a matched-loss control: ``target``, ``reached`` (nats per scored token on the attacked documents),
    ``parameter``, ``reachable`` and, where it is false, ``reason``: then nothing follows from the arm."""


class FinalResults(_Result):
    """final_results.json"""

    schema_: int = Field(default=SCHEMA, alias="schema")
    experiment: str
    seed: int
    success_threshold: float | None
    """τ, nats per scored token: an attack on a document succeeds above it; one for all arms."""
    equivalence_margins: dict[str, float]
    """By attack: half width in nats per scored token within which arms count as equivalent."""
    measurements: list[Measurement]
    arms: dict[str, ArmResult]
    comparisons: list[Comparison]
    verdicts: list[Verdict] = []
    """On the robustness of each arm at matched clean loss."""
    decompositions: list[Decomposition] = []
    """Of the gaps between the baseline and each arm."""
    masking: dict[str, Masking] = {}
    """By arm: signs that gradients mislead attacks on it more than on the baseline."""
    family: list[FamilyMember] = []
    """The confirmatory family, as the configuration declares it."""
    conclusions: list[Conclusion]
    transfer: list[Transfer] = []
    """Every arm's edits and triggers on every arm, where attacks.transfer asks for it."""
    differences_between_arms: list[dict[str, Any]]


class AttackedModel(_Result):
    """A model that was given to ``isotone attack``."""

    name: str
    """The end of its source: results hold no path."""
    model_type: str
    num_parameters: int
    context: int | None
    revision: str | None
    """Commit on the hub; None where it is local."""
    files: dict[str, str]
    """SHA-256 by name."""


class AttackSuiteResults(FinalResults):
    """attack_results.json: what a run's final_results.json holds, and of what."""

    attacks: list[str]
    """What was asked for."""
    models: dict[str, AttackedModel]
    """By arm; a control at matched loss is made from the baseline."""
    documents: dict[str, Any]
    """Numbers of attacked (attack_test) and search documents, and every one left out, with its reason."""
    settings: dict[str, Any]
    """The configuration's ``attacks``, with nothing left open."""
    notes: list[str]
    """What a reader should know."""


class SeedDifference(_Result):
    """What the run of one seed says about the same two arms and measure."""

    seed: int
    value_a: float
    value_b: float
    difference: float
    ci95: Interval
    p: float | None
    test: str
    n: int
    only_a: int | None
    only_b: int | None


class ComparisonOverSeeds(Comparison):
    """Two arms on the same documents, crossed with the seeds of their models."""

    by_seed: list[SeedDifference]


class ArmOverSeeds(_Result):
    """The figures of one arm over all seeds in one place."""

    perplexity: float | None
    bits_per_byte: float | None
    hotflip: dict[str, Any] | None
    """The primary variant's entry, and every variant's under ``variants``."""
    triggers: dict[str, Any] | None
    attacks: dict[str, Any] = {}
    """By name: further attacks and the ensemble."""
    certificate: dict[str, Any] | None
    """``verdict`` and ``order`` of all seeds (with the seeds, where they differ), and ``by_seed``."""
    training: dict[str, Any]
    """By seed; None for an arm that is not trained."""
    matched_loss: dict[str, Any] = {}
    """By seed, for a matched-loss control; empty for other arms."""


class SummaryResults(_Result):
    """summary/final_results.json"""

    schema_: int = Field(default=SCHEMA, alias="schema")
    experiment: str
    seeds: list[int]
    success_thresholds: dict[str, float | None]
    """By seed: τ of that seed's own baseline, nats per scored token. A pooled success rate counts each seed's by it."""
    equivalence_margins: dict[str, float]
    """By attack: the mean over seeds of their margins, half width in nats per scored token."""
    equivalence_margins_by_seed: dict[str, dict[str, float]]
    """By seed, then by attack."""
    measurements: list[Measurement]
    """Those of every seed's run."""
    pooled: list[PooledMeasurement]
    """The same over all seeds."""
    arms: dict[str, ArmOverSeeds]
    comparisons: list[ComparisonOverSeeds]
    verdicts: list[Verdict] = []
    """On the robustness of each arm at matched clean loss."""
    decompositions: list[Decomposition] = []
    """Of the gaps between the baseline and each arm."""
    masking: dict[str, Masking] = {}
    """By arm: signs that gradients mislead attacks on it more than on the baseline."""
    family: list[FamilyMember] = []
    """The confirmatory family, as the configuration declares it."""
    conclusions: list[Conclusion]
    transfer: list[PooledTransfer] = []
    """Every arm's edits and triggers on every arm, where attacks.transfer asks for it."""
    differences_between_arms: list[dict[str, Any]]
    not_pooled: list[dict[str, Any]]
    """Measures that some seeds have and others lack, with the seeds that lack them."""


class EvaluationResults(_Result):
    """evaluation_results.json"""

    schema_: int = Field(default=SCHEMA, alias="schema")
    seed: int
    arms: dict[str, dict[str, Any]]


class AttackResults(_Result):
    """hotflip_results.json and uat_results.json"""

    schema_: int = Field(default=SCHEMA, alias="schema")
    seed: int
    attack: str
    arms: dict[str, dict[str, Any]]


class Ratio(_Result):
    """A perplexity over the best baseline's on the same validation documents, paired by document."""

    value: float
    ci95: Interval
    n: int


class SweepRemainder(_Result):
    """What the attack suite found of a chosen point, where best.yaml was run: Δ of the baseline minus Δ of the arm at
    equal clean loss, in nats per scored token."""

    control: str
    value: float
    ci95: Interval


class SweptPoint(_Result):
    """One combination of a sweep's axes."""

    id: str
    arm: str
    settings: dict[str, Any]
    """Values by axis, a dotted key of the arm."""
    state: str
    """complete; refused (the combination does not fit); diverged (a loss that is not finite); or how far it is, as
    ``isotone status`` says."""
    reason: str
    """Why it is not complete, or cannot be chosen."""
    nll: float | None = None
    """Nats per token of validation text."""
    perplexity: float | None = None
    ratio: Ratio | None = None
    certificate: str | None = None
    """Verdict on the weights that it ended with."""
    remainders: list[SweepRemainder] = []
    """One a matched-loss control; empty where best.yaml was not run, or has no such control."""


class SweepResults(_Result):
    """sweep.json"""

    schema_: int = Field(default=SCHEMA, alias="schema")
    experiment: str
    seed: int
    checkpoint: str
    """Which checkpoint is scored."""
    points: list[SweptPoint]
    chosen: dict[str, str]
    """By arm the id of its point with the lowest validation loss; empty while a point is open."""
    searched: dict[str, int]
    """By arm, how many points were complete: the size of its search."""
    notes: list[str]
    """What a reader should know."""
    found: dict[str, str]
    """By point, what the table was made from: a hash of what it found, or how it ended."""


PUBLISHED: dict[str, type[BaseModel]] = {
    "final_results": FinalResults,
    "evaluation_results": EvaluationResults,
    "hotflip_results": AttackResults,
    "uat_results": AttackResults,
}
"""Result files of a run by name, without ``.json``."""

SUMMARY = "summary"
"""Name of the schema of summary/final_results.json, the result file over seeds."""

ATTACK = "attack_results"
"""Name of the schema of the file that ``isotone attack`` writes."""

SWEEP = "sweep"
"""Name of the schema of the file that ``isotone sweep`` writes."""

SCHEMAS: dict[str, type[BaseModel]] = {
    **PUBLISHED,
    SUMMARY: SummaryResults,
    ATTACK: AttackSuiteResults,
    SWEEP: SweepResults,
}


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a result file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **SCHEMAS[name].model_json_schema(by_alias=True),
        "title": "summary/final_results.json" if name == SUMMARY else f"{name}.json",
    }


def to_json(result: BaseModel) -> dict[str, Any]:
    """Return a result as it is written."""
    return result.model_dump(mode="json", by_alias=True)


if __name__ == "__main__":
    for result_name in SCHEMAS:
        records.write_json(SCHEMA_FOLDER / f"{result_name}.schema.json", json_schema(result_name))
