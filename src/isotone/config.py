"""The experiment: every value of a run, in one validated file. Unknown keys and wrong types are refused."""

import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from isotone.cluster import Cluster
from isotone.config_family import declared_variant, why_never_measured
from isotone.config_sweep import axis_problem
from isotone.config_types import Count, NonNegative, Number, Part, Positive, Share
from isotone.constraint.recipes import CALIBRATION_REFUSED, FIXED, ROTATED
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS, USES

Scope = Literal["mlp_in", "mlp_both", "mlp_in_attn_out", "gated_updown", "gated_all"]
Parametrization = Literal["softplus", "scaled_softplus", "square", "magnitude", "projection", "sign_frozen"]
Initialization = Literal["absolute", "relu", "shift", "calibrated_shift", "nnls", "rotated_nnls", "unchanged"]
Recipe = Literal["published", "published_bf16", "recommended"]
Activation = Literal["relu", "monotone_gelu"]
Layers = (
    Annotated[tuple[int, ...], Field(min_length=1)]
    | Annotated[str, Field(pattern=r"^((first|last):[1-9][0-9]*|(-?[0-9]+)?:(-?[0-9]+)?)$")]
)
Checkpoint = Literal["best", "last"]
Matching = Literal["temperature", "noise", "undertrained"]

PUBLISHED_SUCCESS_OF_PAIRS = 0.10
"""``attacks.hotflip.published_success`` of pairs, unless given: that of the T5 track."""

NO_ARMS = ("pretrained", "random")
"""What an arm starts from that is no other arm's end."""

WEB_BIBLE = "web-bible"
"""The ``data.source`` of the bundled corpus."""

BIBLE_PAIRS = "bible-pairs"
"""The ``data.source`` of the bundled pairs."""


class Model(Part):
    """Where the pretrained model comes from."""

    source: str = "pocket"
    """``pocket`` (bundled; also ``pocket-t5``, ``pocket-arcee``, ``pocket-gated``), a folder, a GGUF file, or a name on
    the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; setup pins it to a commit."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the folder or hub repository."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel."""
    allow_pickle: bool = False
    """Load weights from pickles (``pytorch_model.bin``); they can execute code."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class PairSource(Part):
    """One of several sources of pairs: to train on, or to be held out."""

    source: str
    """A file or folder (jsonl, jsonl.gz, jsonl.zst, parquet), or a hub data set."""
    source_field: str
    """The field that an encoder-decoder reads."""
    target_field: str
    """The field that it is to write."""
    use: Literal["train", "test"]
    """train: the splits train and validation; test: test, attack_search and attack_test. Shares stay in proportion."""
    config_name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set that pairs are taken from."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; setup records the commit."""
    num_documents: Count | None = None
    """Take only the first N pairs."""

    @field_validator("source")
    @classmethod
    def _is_not_bundled(cls, source: str) -> str:
        if source in (WEB_BIBLE, BIBLE_PAIRS):
            raise ValueError(
                f"{source} is bundled and cannot be one of several; give it as data.source, without sources"
            )
        return source


class Data(Part):
    """The corpus, its splits and its packing."""

    source: str = WEB_BIBLE
    """``web-bible`` or ``bible-pairs`` (bundled), a file or folder (txt, jsonl, jsonl.gz, jsonl.zst, parquet), or a hub
    data set."""
    text_field: str = "text"
    """The field that holds the text, in jsonl, parquet and hub data sets."""
    source_field: str | None = None
    """The field that an encoder-decoder reads, there; with ``target_field`` it makes a document a pair of texts."""
    target_field: str | None = None
    """The field that it is to write."""
    target_file: str | None = None
    """Text file whose lines are the targets of the lines of the text file ``source``: pairs, too."""
    sources: tuple[PairSource, ...] = ()
    """Several sources of pairs, instead of ``source``: some to train on, others to be held out."""
    source_prefix: str = ""
    """What is put before every source, such as "summarize: " for T5."""
    source_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a pair's source, its EOS included; longer ones are cut and counted."""
    target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a pair's target, its EOS included; longer ones are cut and counted."""
    config_name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set that documents are taken from."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set; setup pins it to a commit."""
    num_documents: Count | None = None
    """Take only the first N documents."""
    min_chars: Annotated[int, Field(ge=1)] = 1
    """Leave out documents with fewer characters; they are counted."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens in a training row; a pair's row has ``source_length`` + ``target_length`` instead."""
    fractions: dict[str, Share] = DEFAULT_FRACTIONS
    """Share of documents of each split: train, validation, test, attack_search, attack_test."""
    shuffle_seed: int = 0
    """Keys which held-out documents are taken first where only some of them are used."""

    @property
    def pairs(self) -> bool:
        """Whether a document is a source and a target, for an encoder-decoder."""
        one = self.source == BIBLE_PAIRS or self.source_field is not None or self.target_file is not None
        return one or bool(self.sources)

    @property
    def row_length(self) -> int:
        """Tokens in a training row."""
        return self.source_length + self.target_length if self.pairs else self.sequence_length

    @model_validator(mode="after")
    def _pairs_are_given_in_one_way(self) -> "Data":
        given = self.model_fields_set
        if (self.source_field is None) != (self.target_field is None):
            there, missing = ("source", "target") if self.target_field is None else ("target", "source")
            raise ValueError(f"{there}_field: a pair has two fields; give {missing}_field, too, or neither")
        if self.source == BIBLE_PAIRS and (self.source_field or self.target_file):
            raise ValueError(f"source: {BIBLE_PAIRS} has its own targets; leave source_field and target_file out")
        if self.target_file is not None and self.source_field is not None:
            raise ValueError("target_file: pairs are two text files, or two fields; leave one of them out")
        if self.sources:
            single = ("source", "source_field", "target_file", "config_name", "split", "revision", "num_documents")
            for key in single:
                if key in given and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: give it under sources, of which each has its own, or leave sources out")
            if {part.use for part in self.sources} != {"train", "test"}:
                raise ValueError("sources: some have use: train and some use: test; found one kind only")
            if empty := [use for use, splits in USES.items() if not sum(self.fractions.get(s, 0) for s in splits)]:
                raise ValueError(f"fractions: nothing is left of {', '.join(USES[empty[0]])} for use: {empty[0]}")
        wrong = ("text_field", "sequence_length") if self.pairs else ("source_prefix", "source_length", "target_length")
        for key in wrong:
            if key in given and getattr(self, key) != type(self).model_fields[key].default:
                why = "has no meaning for pairs" if self.pairs else "is of pairs; give source_field and target_field"
                raise ValueError(f"{key}: {why}, or leave it out")
        for key in ("source_field", "target_file"):
            if self.source == WEB_BIBLE and getattr(self, key) is not None:
                raise ValueError(f"{key}: {WEB_BIBLE} holds no pairs; give the source of the pairs, or leave it out")
        return self

    @model_validator(mode="after")
    def _fractions_sum_to_one(self) -> "Data":
        if set(self.fractions) != set(SPLITS):
            raise ValueError(f"fractions: expected exactly {', '.join(SPLITS)}")
        if not math.isclose(sum(self.fractions.values()), 1, abs_tol=1e-9):
            raise ValueError(f"fractions: sum to {sum(self.fractions.values()):g}, must sum to 1")
        return self


class Constraint(Part):
    """How an arm's feed-forward weights are kept non-negative, and where they start."""

    recipe: Recipe | None = None
    """A named combination of parametrization, initialization and precision; what is given beside it goes first."""
    scope: Scope = "mlp_both"
    """Which projections are constrained."""
    layers: Layers | None = None
    """The blocks in which they are: a list of indices, ``first:N``, ``last:N``, or a slice such as ``2:6``. Blocks are
    counted from 0, an encoder's before a decoder's. None: all."""
    activation: Activation | None = None
    """Put in the place of the activation in these blocks; monotone_gelu: GELU(max(x, −0.75)). None: the model's own."""
    parametrization: Parametrization | None = None
    """How a weight is kept non-negative; ``sign_frozen`` (a control) keeps it on the side of 0 where it starts."""
    initialization: Initialization | None = None
    """Where the constrained weights start; ``unchanged`` belongs to ``sign_frozen``."""
    anneal: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of the steps in which the constraint comes: W = W⁺ − λW⁻ with λ from 1 to 0, from the unconstrained weights
    (initialization unchanged, parametrization projection); then it holds strictly. None: it holds from the start."""
    enforce: bool = True
    """False (a control): only the start; the weights are then trained like any others and may become negative."""
    calibration_rows: Count = 64
    """Training rows that ``calibrated_shift``, ``nnls``, ``rotated_nnls`` and ``calibrate`` are fitted on."""
    calibrate: bool = False
    """After the start, match mean and variance of every unit and output to the original's, on calibration rows."""
    step: Literal["raw", "matched"] = "raw"
    """matched: masters move so that weights move as far as under ``projection``; raw: as far as the optimizer says."""

    @model_validator(mode="after")
    def _named_or_given(self) -> "Constraint":
        if self.anneal is not None:
            for key, found, allowed in (
                ("parametrization", self.parametrization, "projection"),
                ("initialization", self.initialization, "unchanged"),
            ):
                if found not in (None, allowed):
                    raise ValueError(f"{key}: found {found!r}, allowed with anneal: {allowed!r}, or leave it out")
            if not self.enforce:
                raise ValueError("enforce: false leaves nothing of anneal; leave one of them out")
        elif self.recipe is None and (self.parametrization is None or self.initialization is None):
            raise ValueError("give either recipe, or both parametrization and initialization")
        if self.calibrate and self.initialization in CALIBRATION_REFUSED:
            raise ValueError(CALIBRATION_REFUSED[self.initialization])
        if self.recipe in FIXED:
            for key in ("anneal", "step", "calibrate"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: recipe {self.recipe} has none, and its name must mean it; leave one out")
        if not self.enforce and self.step != "raw":
            raise ValueError("step: enforce: false leaves nothing whose steps could be matched; leave one of them out")
        if not self.enforce and self.parametrization == "sign_frozen":
            raise ValueError("enforce: false leaves nothing of parametrization sign_frozen; leave one of them out")
        return self


class Distill(Part):
    """Distillation from the model that an arm starts from, as it is before its constraint, in the first steps.

    Shares are of all steps; what remains trains on the plain loss. An arm that starts at random learns from the
    pretrained model.
    """

    blocks: Share = 0.0
    """Share in which the states after each block are matched; comes first."""
    logits: Share = 0.0
    """Share in which the predictions are matched; follows."""
    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Weight of what is matched; the plain loss has the rest."""
    temperature: Positive = 1.0
    """Divides both sides' logits where predictions are matched."""

    @property
    def share(self) -> Fraction:
        """Share of all steps in which something is distilled."""
        return Fraction(str(self.blocks)) + Fraction(str(self.logits))

    @model_validator(mode="after")
    def _shares_fit(self) -> "Distill":
        if self.share > 1:
            raise ValueError(f"blocks: {self.blocks:g} and logits: {self.logits:g} are more than all steps")
        return self


class Training(Part):
    """One recipe of training; an arm may override single values of it."""

    epochs: Positive = 1.0
    """Passes over the training rows; may be a fraction."""
    micro_batch: Count = 8
    """Rows in one forward pass; memory errors halve it at the same effective batch."""
    accumulation: Count = 4
    """Micro-batches in one optimizer step; effective batch = micro_batch × accumulation."""
    lr: Positive = 1e-5
    """Peak learning rate."""
    min_lr_ratio: Share = 0.0
    """The schedule's end, as a share of the peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Decay after the warmup."""
    warmup: Share = 0.1
    """Share of all steps in which the rate rises linearly."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay of matrices; constrained masters, biases and norms are never decayed."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's averaging constants."""
    eps: Positive = 1e-8
    """AdamW's denominator term."""
    clip: Positive = 1.0
    """Largest norm of the whole gradient."""
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"] = "auto"
    """fp32, or bf16 autocast over fp32 masters; auto: by the device, once. pure_bf16 belongs to published_bf16."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: ddp, each holds the whole model; fsdp, each holds a part. One: ignored."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    save_every_steps: Count = 500
    """Checkpoint every N optimizer steps."""
    save_every_minutes: Positive = 15.0
    """Checkpoint at least every M minutes."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept beside the best one."""
    validate_every_steps: Count | None = None
    """Validate every N optimizer steps, and always at epoch ends."""
    validation_rows: Count = 64
    """Rows of the validation split that are scored."""
    random_prefix: Share = 0.0
    """Share of a row's attackable prefix (tokens 1…P−1 of ``attacks.protocol``) that the model reads as random
    admissible tokens, other ones in every step; the labels stay the true ones."""
    distill: Distill = Distill()
    """Learn from the model before its constraint first; off unless a share is given."""


class ArmTraining(Part):
    """Values of ``training`` that an arm changes."""

    epochs: Positive | None = None
    lr: Positive | None = None
    min_lr_ratio: Share | None = None
    schedule: Literal["cosine", "linear"] | None = None
    warmup: Share | None = None
    weight_decay: NonNegative | None = None
    random_prefix: Share | None = None
    distill: Distill | None = None


class MatchedLoss(Part):
    """A control at equal clean loss: the model that the arm starts from, damaged until it is as bad as another arm.

    The loss is that of the attacks' scored tokens on the attacked documents, in fp32.
    """

    to: str
    """The arm whose clean loss is aimed at."""
    by: Matching
    """temperature: logits divided by T; noise: W + λ·std(W)·ξ on the matrices that arm ``to`` constrains;
    undertrained: the training of ``start`` once more, stopped where the loss is met."""
    draw: Count = 1
    """Number of the noise's draw: several arms that differ in it have different ξ."""
    scope: Scope | None = None
    """Where the noise goes, instead."""
    above: NonNegative = 0.0
    """Aim so many nats per scored token above that loss. Then the arm is a level of damage, and no arm's control."""

    @model_validator(mode="after")
    def _draw_and_scope_are_of_noise(self) -> "MatchedLoss":
        for key, given in (("draw", self.draw != 1), ("scope", self.scope is not None)):
            if given and self.by != "noise":
                raise ValueError(f"{key}: only by: noise has one; by is {self.by}")
        return self


class Arm(Part):
    """One model of the experiment."""

    start: str = "pretrained"
    """``pretrained``; ``random``: a model of the same configuration with new weights, drawn with the run's seed; or the
    name of the arm whose end this one starts from."""
    constraint: Constraint | None = None
    """None: unconstrained."""
    train: bool = True
    """False: measured as it starts."""
    training: ArmTraining = ArmTraining()
    """What differs from the experiment's ``training``."""
    matched_loss: MatchedLoss | None = None
    """Makes the arm a matched-loss control of another one."""

    @property
    def held(self) -> Constraint | None:
        """The constraint that holds to the end, if there is one."""
        return self.constraint if self.constraint and self.constraint.enforce else None

    @property
    def certified_scope(self) -> Scope | None:
        """The projections that the arm claims to be non-negative; None where it claims nothing."""
        return self.held.scope if self.held and self.held.parametrization != "sign_frozen" else None

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms whose ends it is made from."""
        others = (self.start, self.matched_loss.to if self.matched_loss else "pretrained")
        return tuple(dict.fromkeys(name for name in others if name not in NO_ARMS))


class Rouge(Part):
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum of what an encoder-decoder writes for held-out sources."""

    num_documents: Count | None = None
    """Take only the first N pairs of those that are evaluated."""
    beams: Count = 4
    """Beams of the search; 1: greedy. Nothing is drawn at random."""
    length_penalty: Number = 1.2
    """Power of the length by which a beam's score is divided: above 0 longer texts gain."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 3
    """No N-gram is written twice; 0: any may be."""
    max_tokens: Count | None = None
    """Most tokens of a written text; ``data.target_length`` unless given."""
    batch_size: Count = 8
    """Sources in one search; part of the result, as batches fix the rounding."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the documents for the intervals."""


class Evaluation(Part):
    """Held-out perplexity and bits per byte; of pairs, of the target, and ROUGE."""

    stride: Count | None = None
    """Tokens between windows; half the context unless given."""
    context: Count | None = None
    """Tokens in a window; the model's context, but at most 2,048, unless given."""
    batch_size: Count = 8
    """Windows in one forward pass."""
    split: Literal["validation", "test"] = "test"
    """Whose documents are scored. On validation text choices are made (``isotone sweep``): an experiment on it ends
    there, with neither attacks nor results, and needs no baseline. What is concluded rests on test text."""
    num_documents: Count | None = None
    """Take only the first N documents of the split."""
    checkpoints: Annotated[tuple[Checkpoint, ...], Field(min_length=1)] = ("last", "best")
    """Which checkpoints of a trained arm are evaluated."""
    rouge: Rouge | None = None
    """Of pairs: what the checkpoint that is attacked writes. None: not measured."""


class Protocol(Part):
    """What is attacked and what is scored.

    Of a text tokens 1…prefix−1 are attacked, gap is neither attacked nor scored; of a pair the source is attacked and
    the target is scored.
    """

    prefix: Annotated[int, Field(ge=2)] = 64
    gap: Annotated[int, Field(ge=0)] = 8
    continuation: Count = 64
    source: Annotated[int, Field(ge=3)] | None = None
    """Tokens of a pair's source, its EOS included; what is longer is cut. ``data.source_length`` unless given."""
    target: Annotated[int, Field(ge=2)] | None = None
    """Scored tokens of a pair's target, its EOS included; longer ones are cut. ``data.target_length`` unless given."""

    @model_serializer(mode="wrap")
    def _without_what_is_of_pairs(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out sides where there are none, as nothing that is written down of texts has them."""
        return {key: value for key, value in serialize(self).items() if value is not None}

    @property
    def length(self) -> int:
        """Tokens that a text must have; of a pair, those that one has which fills both sides."""
        if self.source is not None and self.target is not None:
            return self.source + self.target
        return self.prefix + self.gap + self.continuation

    @property
    def num_attackable(self) -> int:
        """Tokens that may be edited, of a pair at most: EOS never is, and of a text the first one never is."""
        return (self.prefix if self.source is None else self.source) - 1

    @property
    def num_scored(self) -> int:
        """Scored tokens, of a pair at most."""
        return self.continuation if self.target is None else self.target


class HotFlip(Part):
    """HotFlip (Ebrahimi et al. 2018), in several methods."""

    flips: Count = 10
    """Most edited tokens a document (Hamming distance)."""
    methods: Annotated[tuple[Literal["once", "iterative", "beam", "shuffled"], ...], Field(min_length=1)] = (
        "once",
        "iterative",
    )
    """once: one gradient, all flips together; iterative: gradient, exact evaluation and one flip a round; beam: the
    same for several texts at a time; shuffled: iterative with gradients of other positions, a control."""
    candidates: Count = 32
    """Exactly evaluated candidates a round; with attacks.budget_tokens as many as that buys."""
    beam_width: Count = 4
    """Texts that the beam keeps."""
    published_success: Positive = 0.15
    """Relative increase that the published accounting calls a success; of pairs .10 unless given."""


class Triggers(Part):
    """Universal adversarial triggers (Wallace et al. 2019)."""

    length: Count = 10
    """Tokens of a trigger."""
    candidates: Count = 100
    """Exactly evaluated candidates an iteration."""
    iterations: Count = 100
    """Iterations a restart."""
    restarts: Count = 5
    """Independent searches; the best on search documents is reported, all are listed."""
    batch_size: Count = 8
    """Search documents on which one iteration is evaluated."""
    proposals: Literal["gradient", "surrogate"] = "gradient"
    """Where candidates come from: the gradient, or a regression on what the restart evaluated."""
    budget_tokens: Count | None = None
    """Forward tokens (a backward counts twice) that the whole search may spend; iterations end early at it."""


class Gcg(Part):
    """Greedy coordinate gradient (Zou et al. 2023); edits at most attacks.hotflip.flips tokens."""

    top_k: Count = 64
    """Tokens of a position, best by gradient, that candidates are drawn from."""
    candidates: Count = 64
    """Exactly evaluated candidates a step."""
    steps: Count = 20
    """Steps, where attacks.budget_tokens is not given."""


class Coordinate(Part):
    """Gradient-free coordinate search; edits at most attacks.hotflip.flips tokens."""

    candidates: Count = 32
    """Exactly evaluated candidates a round."""
    rounds: Count = 40
    """Rounds, where attacks.budget_tokens is not given."""
    proposals: Literal["random", "surrogate"] = "random"
    """Where candidates come from: random draws, or a regression on what was evaluated of the document."""


class Pgd(Part):
    """Projected gradient ascent on the embeddings of attacks.hotflip.flips positions: an upper bound, not a text."""

    steps: Count = 20
    """Steps, where attacks.budget_tokens is not given."""
    radius: Positive = 1.0
    """L2 radius around each embedding, in median distances from it to the embeddings of admissible tokens."""


class Frequency(Part):
    """Random edits with tokens as frequent as in the search documents; as many as attacks.hotflip.flips."""

    draws: Count = 1
    """Draws a document; the first is the attack."""


class Probe(Part):
    """How much gradients tell of what edits do: what two signs of masking are measured on. No attack."""

    edits: Annotated[int, Field(ge=2)] = 500
    """Random single edits a document, for the rank correlation of first-order and true change."""
    candidates: Count = 32
    """Tokens of one position that are taken by gradient, and as many at random, against the best of all."""
    oracle_tokens: Count | None = None
    """Admissible tokens that are tried there: all of them unless given, else so many random ones, which is cheaper."""
    num_documents: Count = 8
    """How many of the attacked documents are asked about, the first ones; each costs a forward for each token tried."""

    @model_validator(mode="after")
    def _candidates_can_miss_something(self) -> "Probe":
        if self.oracle_tokens is not None and self.candidates >= self.oracle_tokens:
            raise ValueError(
                f"candidates: {self.candidates} of the {self.oracle_tokens} tokens of oracle_tokens cannot miss the "
                f"best of them; take fewer"
            )
        return self


class Attacks(Part):
    """What all attacks share, and each attack's own values."""

    protocol: Protocol = Protocol()
    num_documents: Count = 200
    """Attacked documents of the attack_test split."""
    num_search_documents: Count = 40
    """Documents of the attack_search split: thresholds and triggers are fitted on them."""
    batch_documents: Count = 8
    """Documents attacked together; part of the result, as batches fix the rounding."""
    random_draws: Count = 20
    """Random edits a search document, for the success threshold."""
    checkpoint: Checkpoint = "last"
    """Which checkpoint is attacked, and from which other arms start."""
    hotflip: HotFlip = HotFlip()
    triggers: Triggers = Triggers()
    budget_tokens: Count | None = None
    """Forward tokens (a backward counts twice) that an attack may spend on a document; all searches get the same."""
    gcg: Gcg | None = None
    """None: not made; so for the three below."""
    coordinate: Coordinate | None = None
    pgd: Pgd | None = None
    frequency: Frequency | None = None
    transfer: bool = False
    """Replay every arm's edits and triggers on every other arm."""
    probe: Probe | None = None
    """Compare what gradients predict with what edits do, on every arm but controls at matched loss. None: not done."""

    @model_validator(mode="after")
    def _a_method_that_conclusions_can_rest_on(self) -> "Attacks":
        if self.hotflip.methods == ("shuffled",):
            raise ValueError("hotflip.methods: shuffled is a control; add once, iterative or beam")
        if "beam" in self.hotflip.methods and self.hotflip.candidates < self.hotflip.beam_width:
            raise ValueError(
                f"hotflip.candidates: {self.hotflip.candidates} are fewer than the {self.hotflip.beam_width} beams of "
                "hotflip.beam_width"
            )
        return self

    @model_validator(mode="after")
    def _budget_buys_a_round_of_each(self) -> "Attacks":
        budget = self.budget_tokens
        for key, least in self._least_tokens().items():
            if budget is not None and budget < least:
                raise ValueError(
                    f"budget_tokens: {budget} tokens a document do not buy one round of {key}; "
                    f"at least {least} are needed"
                )
        return self

    def _least_tokens(self) -> dict[str, int]:
        """Return by key what an attack spends on a document at least, in tokens as attacks/budget.py counts them."""
        flips, width, methods = self.hotflip.flips, self.hotflip.beam_width, self.hotflip.methods
        lengths = {f"hotflip.methods {name}": 4 * flips for name in ("iterative", "shuffled") if name in methods}
        if "beam" in methods:
            lengths["hotflip.methods beam"] = 3 * (1 + (flips - 1) * width) + flips * width
        if self.gcg is not None:
            lengths["gcg"] = 3 + self.gcg.candidates
        if self.coordinate is not None:
            lengths["coordinate"] = 1 + self.coordinate.candidates
        if self.pgd is not None:
            lengths["pgd"] = 3
        return {key: number * self.protocol.length for key, number in lengths.items()}


class Declared(Part):
    """A measure of every arm against the baseline, declared before it is looked at."""

    metric: Literal["nll", "bits_per_byte", "rouge1", "rouge2", "rougeLsum", "delta_nll", "success_rate", "top1_change"]
    attack: str | None = None
    """None: of clean text. Else as results name it: hotflip, triggers, random_edits, a further one, or ensemble."""
    variant: str | None = None
    """The one that conclusions rest on unless given (hotflip: the strongest of its methods; else the only one)."""

    @model_validator(mode="after")
    def _attack_where_something_is_attacked(self) -> "Declared":
        clean = self.metric in ("nll", "bits_per_byte", "rouge1", "rouge2", "rougeLsum")
        if clean and (self.attack or self.variant):
            raise ValueError(f"attack: {self.metric} is of clean text; leave attack and variant out")
        if not clean and self.attack is None:
            raise ValueError(f"attack: {self.metric} is of an attack; name it")
        return self


class Analysis(Part):
    """What is decided before anything is measured."""

    family: Annotated[tuple[Declared, ...], Field(min_length=1)] = (
        Declared(metric="nll"),
        Declared(metric="delta_nll", attack="hotflip"),
        Declared(metric="delta_nll", attack="triggers"),
    )
    """The confirmatory family, corrected together by Holm; all other comparisons are exploratory."""
    margin_share: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """δ, the margin of equivalence, as a share of an attack's Δ on the baseline's search documents."""
    min_documents: Count = 20
    """Attacked documents with figures on all sides below which there is no verdict."""
    min_spent_tokens: Count | None = None
    """Tokens that some search must have spent on a document for a verdict; 20 forwards of ``attacks.protocol`` unless
    given."""
    level: Annotated[Number, Field(gt=0, le=0.05)] = 0.05
    """Level of the family's corrected p; intervals stay at 95 %, and those of equivalence at 90 %."""


class Sweep(Part):
    """What ``isotone sweep`` tries: settings of arms, of which those that are best on validation text are chosen."""

    arms: Annotated[dict[str, dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]], Field(min_length=1)]
    """By arm: its axes, each a dotted key of the arm (constraint.scope, training.lr) with the values to try; every
    combination is a point. Unless the baseline has axes of its own, it gets those of training that the arms have, with
    values between theirs until it has as many points as the arm with most."""
    num_documents: Count | None = None
    """Take only the first N documents of the validation split."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Of all points, unless ``--seed`` or EXPERIMENT_SEED gives another; the first of ``seeds`` unless given."""


class Runtime(Part):
    """How the machine is used. auto values are resolved once, at the first start of a run, and kept."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count | None = None
    """CPU threads of torch; the machine's cores unless given. Part of the result."""
    log_every_seconds: Positive = 15.0
    """Plain progress lines, where there is no terminal."""


class Experiment(Part):
    """One experiment: model, data, arms, training, evaluation, attacks and seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the folder under runs/."""
    description: str = ""
    """One line that ``isotone presets`` shows."""
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    arms: dict[str, Arm] = {"baseline": Arm(), "monotonic": Arm(constraint=Constraint(recipe="published"))}
    evaluation: Evaluation = Evaluation()
    attacks: Attacks = Attacks()
    analysis: Analysis = Analysis()
    runtime: Runtime = Runtime()
    sweep: Sweep | None = None
    """What ``isotone sweep`` tries; ``isotone run`` runs the arms as they are."""
    cluster: Cluster = Cluster()
    """What Slurm jobs ask for, over the site profile; no result depends on it."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (42,)
    """One run a seed."""

    @model_validator(mode="after")
    def _pairs_have_a_protocol_of_their_own(self) -> "Experiment":
        """Fill in what pairs have as defaults, so that it stands in what is written down of the experiment."""
        protocol, data = self.attacks.protocol, self.data
        if not data.pairs:
            if given := [key for key in ("source", "target") if getattr(protocol, key) is not None]:
                raise ValueError(
                    f"attacks.protocol.{given[0]}: only of pairs (data.source_field); texts have prefix, gap and "
                    "continuation"
                )
            return self
        for key in ("prefix", "gap", "continuation"):
            if getattr(protocol, key) != Protocol.model_fields[key].default:
                raise ValueError(
                    f"attacks.protocol.{key}: has no meaning for pairs; give source and target, or neither"
                )
        lengths = {"source": data.source_length, "target": data.target_length}
        for key, longest in lengths.items():
            if (getattr(protocol, key) or 0) > longest:
                raise ValueError(
                    f"attacks.protocol.{key}: {getattr(protocol, key)} tokens are more than the {longest} of "
                    f"data.{key}_length that are kept of a {key}"
                )
        hotflip = self.attacks.hotflip
        if "published_success" not in hotflip.model_fields_set:
            hotflip = hotflip.model_copy(update={"published_success": PUBLISHED_SUCCESS_OF_PAIRS})
        filled = {key: getattr(protocol, key) or longest for key, longest in lengths.items()}
        own = {"protocol": protocol.model_copy(update=filled), "hotflip": hotflip}
        object.__setattr__(self, "attacks", self.attacks.model_copy(update=own))
        return self

    @model_validator(mode="after")
    def _family_is_measured(self) -> "Experiment":
        for index, declared in enumerate(self.analysis.family):
            if (problem := why_never_measured(declared, self.attacks)) is not None:
                raise ValueError(f"analysis.family.{index}.{problem}")
        meant = {(d.metric, d.attack, declared_variant(d, self.attacks)) for d in self.analysis.family}
        if len(meant) < len(self.analysis.family):
            raise ValueError("analysis.family: a member is there twice")
        return self

    @model_validator(mode="after")
    def _arms_fit_together(self) -> "Experiment":
        chooses = self.evaluation.split == "validation"  # a single arm of an experiment may stand alone then
        for name, arm in self.arms.items():
            if not name.isidentifier() or name in NO_ARMS:
                raise ValueError(
                    f"arms.{name}: a name is made of letters, digits and _, and is neither 'pretrained' nor 'random'"
                )
            if arm.start not in (*NO_ARMS, *self.arms):
                raise ValueError(
                    f"arms.{name}.start: there is no arm {arm.start!r}; allowed: {', '.join((*NO_ARMS, *self.arms))}"
                )
            if not arm.train and arm.training != ArmTraining():
                raise ValueError(f"arms.{name}.training: the arm is not trained (train: false)")
            if not arm.train and arm.constraint and not arm.constraint.enforce:
                raise ValueError(
                    f"arms.{name}.constraint.enforce: false says how the arm is trained; it has train: false"
                )
            if not arm.train and arm.constraint and arm.constraint.anneal is not None:
                raise ValueError(f"arms.{name}.constraint.anneal: comes with training; the arm has train: false")
            rotated = arm.constraint is not None and arm.constraint.initialization == ROTATED
            if rotated and self.training_of(name).distill.blocks > 0:
                raise ValueError(
                    f"arms.{name}.training.distill.blocks: {ROTATED} puts the states after blocks into another basis "
                    "than those of the model that is distilled; distil logits alone, or start from nnls"
                )
            if rotated and self.training_of(name).precision == "pure_bf16":
                raise ValueError(
                    f"arms.{name}.constraint.initialization: {ROTATED} needs weights in fp32, and "
                    "training.precision is pure_bf16; start from nnls"
                )
            if arm.matched_loss:
                self._require_matchable(name, arm, arm.matched_loss)
            if self.training_of(name).precision == "pure_bf16" and (
                arm.train
                and not chooses
                and not any(a.constraint and a.constraint.recipe == "published_bf16" for a in self.arms.values())
            ):
                raise ValueError(
                    "training.precision: pure_bf16 freezes constrained weights near 0; only for recipe published_bf16"
                )
        self._require_no_circle()
        if ("baseline" not in self.arms and not chooses) or self.arms.get("baseline", Arm()).constraint is not None:
            raise ValueError(
                "arms.baseline: an unconstrained arm of this name is needed, all others are compared with it"
            )
        flips, protocol = self.attacks.hotflip.flips, self.attacks.protocol
        if flips > protocol.num_attackable:
            raise ValueError(
                f"attacks.hotflip.flips: {flips} flips do not fit the {protocol.num_attackable} attackable tokens of "
                f"attacks.protocol.{'prefix' if protocol.source is None else 'source'}"
            )
        return self

    @model_validator(mode="after")
    def _rouge_has_pairs(self) -> "Experiment":
        if self.evaluation.rouge is not None and not self.data.pairs:
            raise ValueError("evaluation.rouge: only of pairs (data.source_field); set it to null")
        if self.evaluation.rouge is None and (
            asked := [d.metric for d in self.analysis.family if d.metric.startswith("rouge")]
        ):
            raise ValueError(f"analysis.family: {asked[0]} is never measured; give evaluation.rouge")
        return self

    @model_validator(mode="after")
    def _sweep_has_axes_of_its_arms(self) -> "Experiment":
        if self.sweep and not ("baseline" in self.arms and self.arms["baseline"].train):
            raise ValueError(
                "sweep: points are compared with the baseline's, which is searched as well; give arms.baseline, trained"
            )
        for name, axes in (self.sweep.arms if self.sweep else {}).items():
            if name not in self.arms:
                raise ValueError(f"sweep.arms.{name}: there is no such arm; allowed: {', '.join(self.arms)}")
            arm = self.arms[name]
            if arm.needs:
                raise ValueError(
                    f"sweep.arms.{name}: the arm is made from the end of {arm.needs[0]}; only arms that are made from "
                    f"no other one can be swept"
                )
            for key, values in axes.items():
                if problem := axis_problem(key, values, Arm, is_baseline=name == "baseline"):
                    raise ValueError(f"sweep.arms.{name}.{key}: {problem}")
                if whole := next((other for other in axes if key.startswith(f"{other}.")), None):
                    raise ValueError(
                        f"sweep.arms.{name}.{key}: {whole} is an axis, too, and has a value for it already"
                    )
        return self

    @model_validator(mode="after")
    def _seeds_differ(self) -> "Experiment":
        if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f"seeds: {twice[0]} is given twice; every run has a seed of its own")
        return self

    def _require_matchable(self, name: str, arm: Arm, matched: MatchedLoss) -> None:
        key = f"arms.{name}.matched_loss"
        if arm.train or arm.constraint:
            raise ValueError(f"{key}: the arm is made from another one; it needs train: false and no constraint")
        targets = [other for other, its in self.arms.items() if other != name and not its.matched_loss]
        if matched.to not in targets:
            raise ValueError(f"{key}.to: found {matched.to!r}, allowed: {', '.join(targets)}")
        if matched.to == arm.start and not matched.above:
            raise ValueError(
                f"{key}.to: {matched.to!r} is the arm that it starts from, there is nothing to match; give another "
                "arm, or above: how many nats worse it is to become"
            )
        if matched.by == "noise" and not (matched.scope or self.arms[matched.to].constraint):
            raise ValueError(
                f"{key}.by: noise goes to the matrices that arm {matched.to} constrains, and it has none; give scope"
            )
        start = self.arms.get(arm.start)
        if matched.by == "undertrained" and not (start and start.train and not start.held):
            raise ValueError(
                f"{key}.by: undertrained stops the training of arms.{name}.start, an unconstrained trained arm"
            )

    def _require_no_circle(self) -> None:
        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise ValueError(f"arms.{name}.start: arms start from each other, or are matched, in a circle")
            for needed in self.arms[name].needs:
                visit(needed, (*path, name))

        for name in self.arms:
            visit(name, ())

    def training_of(self, arm: str) -> Training:
        """Return the training recipe of an arm: the experiment's, with what the arm overrides."""
        given = self.arms[arm].training
        return self.training.model_copy(update={k: v for k, v in given if v is not None})


def epochs_as_fraction(epochs: float) -> Fraction:
    """Return a number of epochs exactly: .1 is a tenth, not the nearest binary number."""
    return Fraction(str(epochs))
