"""Brings an arm's model into memory: where it starts, how it is constrained, and where it ended."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from isotone import records
from isotone.attacks import AttackProtocol, PrefixProtocol, SourceProtocol, Vocabulary, Window
from isotone.config import NO_ARMS, Experiment, MatchedLoss
from isotone.config import Constraint as ConstraintConfig
from isotone.constraint import Constraint, constrain, fold, resolve_recipe
from isotone.constraint.initialization import ANNEALED_PAIR, FITTED
from isotone.constraint.journal import Journal
from isotone.constraint.recipes import FIXED
from isotone.constraint.replacement import replace_activation, take_mark
from isotone.data.packed import PackedData, open_packed
from isotone.determinism import stream_key
from isotone.errors import UsageError
from isotone.matching import divide_logits
from isotone.models import load_model, load_tokenizer
from isotone.pipeline.context import Context
from isotone.pipeline.graph import Node
from isotone.training import RandomPrefix, load_weights


def load_pretrained(context: Context) -> PreTrainedModel:
    """Return the pinned model, in fp32 and eval mode, on the run's device.

    Raises:
        UsageError: the model cannot be read, or is no longer the one that setup pinned.
    """
    pin = records.read_json(context.run.pinned_model)
    model = load_model(context.experiment.model, pin=pin)
    nn.Module.to(model, torch.device(context.device))
    return model


def pinned_tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """Return the pinned model's tokenizer."""
    return load_tokenizer(context.experiment.model, pin=records.read_json(context.run.pinned_model))


def load_random(context: Context) -> PreTrainedModel:
    """Return a model of the pinned one's configuration with new weights, the same for all arms of a seed."""
    pretrained = load_pretrained(context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(context.seed, "random_start"))
        config = copy.deepcopy(pretrained.config)
        mark = take_mark(config)
        model = type(pretrained)(config)
    if mark is not None:
        replace_activation(model, mark["name"], mark["layers"])
    nn.Module.to(model, torch.device(context.device))
    return model.eval()


def load_start(context: Context, arm: str) -> PreTrainedModel:
    """Return the model that an arm starts from, unconstrained: pretrained, random, or another arm's end."""
    start = context.experiment.arms[arm].start
    if start in NO_ARMS:
        return load_random(context) if start == "random" else load_pretrained(context)
    return load_end(context, start, context.experiment.attacks.checkpoint)


def load_teacher(context: Context, arm: str) -> PreTrainedModel:
    """Return what an arm distills: the model that it starts from, as it is before its constraint.

    Of an arm that starts at random it is the pretrained model.
    """
    is_random = context.experiment.arms[arm].start == "random"
    model = load_pretrained(context) if is_random else load_start(context, arm)
    if context.experiment.training_of(arm).precision == "pure_bf16":
        model.bfloat16()
    return model


def start_constrained(
    context: Context, arm: str, weights_follow: bool = False
) -> tuple[PreTrainedModel, Constraint | None]:
    """Return the model that an arm starts from, with the arm's constraint set up on it (None where it has none).

    Where the constraint is only a start (``enforce: false``), the model has its weights and is free. What is fitted is
    kept in the node's work folder as it is made, and a signal ends it; not so where several processes fit the same.

    Args:
        context: any node's view of the run.
        arm: the arm's name.
        weights_follow: a checkpoint's weights will be loaded next, so no start is fitted.
    """
    model, config = load_start(context, arm), context.experiment.arms[arm].constraint
    if context.experiment.training_of(arm).precision == "pure_bf16":
        model.bfloat16()
    if config is None:
        return model, None
    parametrization, initialization = combination(config)
    is_fitted = (initialization in FITTED or config.calibrate) and not weights_follow
    constraint = constrain(
        model,
        config.scope,
        parametrization,
        initialization,
        calibration_rows_NL=_calibration_rows(context, config) if is_fitted else None,
        pairs=open_packed(context.run.data).pairs,
        master_dtype=model.dtype,
        will_train=context.experiment.arms[arm].train,
        layers=config.layers,
        activation=config.activation,
        anneal=config.anneal,
        weights_follow=weights_follow,
        calibrate=config.calibrate,
        step=config.step,
        journal=_journal(context) if is_fitted and context.team.size == 1 else None,
    )
    if not config.enforce:
        del fold(model).config.isotone  # which would say of an exported folder what is not claimed
        return model, None
    return model, constraint


def _journal(context: Context) -> Journal:
    identity = records.hash_json(start_identity(context))
    return Journal(
        context.run.work(context.node) / f"start-{identity[:16]}",
        check=lambda: context.stop.check(f"{context.node}: what is fitted is kept; it"),
        progress=context.progress,
    )


def start_identity(context: Context) -> dict[str, str]:
    """Return what a constrained start depends on; other keys than a training's, which does not answer for its start."""
    return {"constraint": context.config_hash, "start": context.inputs_hash}


def load_end(context: Context, arm: str, checkpoint: str) -> PreTrainedModel:
    """Return an arm's model as it ended, unconstrained, in fp32 and eval mode.

    Args:
        context: any node's view of the run.
        arm: the arm's name.
        checkpoint: ``last`` or ``best``; the same for an arm that is not trained.
    """
    if matched := context.experiment.arms[arm].matched_loss:
        return _load_matched(context, arm, matched)
    folder = end_folder(context, arm, checkpoint)
    model, constraint = start_constrained(context, arm, weights_follow=folder is not None)
    if folder is not None:
        load_weights(folder, model, constraint)
    return nn.Module.float(fold(model)).eval()  # transformers' own refuses weights that came from a GGUF file


def _load_matched(context: Context, arm: str, matched: MatchedLoss) -> PreTrainedModel:
    """Return a matched-loss control: what it starts from, with the weights that were published for it."""
    model = load_start(context, arm)
    if matched.by == "temperature":  # not all of it is in the weights: the head may have been tied, the logits capped
        divide_logits(model, records.read_json(context.run.node_result(Node("match", arm)))["parameter"])
    load_weights(context.run.start(arm), model)
    return model.eval()


def end_folder(context: Context, arm: str, checkpoint: str) -> Path | None:
    """Return the checkpoint that an arm ended with; None for an arm that is its start, untouched."""
    node = context.graph.end_of(arm)
    if node.kind == "train" and node.arm == arm:
        name = records.read_json(context.run.node_result(node))["checkpoints"][checkpoint]
        return context.run.checkpoints(arm) / name
    if node in (Node("constrain", arm), Node("match", arm)):
        return context.run.start(arm)
    return None


def combination(config: ConstraintConfig) -> tuple[str, str]:
    """Return parametrization and initialization: what ``anneal`` means, or what is given, or a published recipe's."""
    if config.anneal is not None:
        return ANNEALED_PAIR
    # what other recipes mean is written out, and these mean the same for every kind of model
    recipe = resolve_recipe(config.recipe, "rms_norm") if config.recipe and config.recipe in FIXED else None
    parametrization = config.parametrization or (recipe.parametrization if recipe else None)
    initialization = config.initialization or (recipe.initialization if recipe else None)
    if parametrization is None or initialization is None:
        raise UsageError(
            f"constraint.recipe: an older version made this run, and did not write into its config.yaml what "
            f"{config.recipe} means; run its stages again"
        )
    return parametrization, initialization


def attack_protocol(context: Context) -> AttackProtocol:
    """Return which tokens of a document are attacked and which are scored."""
    return protocol_of(context.experiment, pinned_tokenizer(context))


def protocol_of(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> AttackProtocol:
    """Return which tokens of a document are attacked and which are scored, under a tokenizer."""
    config = experiment.attacks.protocol
    if config.source is None or config.target is None:
        return PrefixProtocol(config.prefix, config.gap, config.continuation)
    return SourceProtocol(
        config.source,
        config.target,
        pad=tokenizer.pad_token_id,
        eos=tokenizer.eos_token_id,
        least=experiment.attacks.hotflip.flips,
        packed=experiment.data.source_length,
    )


def attack_vocabulary(context: Context, model: PreTrainedModel) -> Vocabulary:
    """Return the tokens that attacks may write."""
    num_embeddings = int(model.get_input_embeddings().weight.size(0))  # type: ignore[operator, union-attr]
    return Vocabulary.from_tokenizer(pinned_tokenizer(context), num_embeddings)


def random_prefix(context: Context, arm: str, model: PreTrainedModel) -> RandomPrefix | None:
    """Return what replaces tokens of an arm's training rows; None where nothing does."""
    share = context.experiment.training_of(arm).random_prefix
    if not share:
        return None
    protocol, tokens_N = attack_protocol(context), attack_vocabulary(context, model).ids_N
    kept = (protocol.pad, protocol.eos) if isinstance(protocol, SourceProtocol) else ()
    return RandomPrefix(share, protocol.attackable, tokens_N, context.seed, kept)


def first_token(context: Context) -> int | None:
    """Return the BOS that the tokenizer itself puts before a text, as Llama's and Gemma's do; None elsewhere."""
    return bos_before_text(pinned_tokenizer(context))


def bos_before_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS that a tokenizer itself puts before a text; None where it puts none."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def attacked_windows(
    context: Context, data: PackedData, split: str, first: int | None = None
) -> tuple[list[Window], int]:
    """Return the documents of a split that every attack and arm sees, cut to the protocol, and how many were too short.

    Of pairs the latter are those with too short a source; data have none with an empty target.

    The choice depends on the corpus and the configuration alone. ``first`` is put before each as its token 0.
    """
    config = context.experiment.attacks
    limit = {"attack_test": config.num_documents, "attack_search": config.num_search_documents}[split]
    documents = data.documents(split).shuffled(context.experiment.data.shuffle_seed)
    return attack_protocol(context).cut(documents, limit, first)


def _calibration_rows(context: Context, config: ConstraintConfig) -> torch.Tensor:
    """Return training rows to fit an initialization on, int64 [B, L], the same for all arms of a seed."""
    rows = open_packed(context.run.data).rows("train")
    rng = np.random.default_rng(stream_key(context.seed, "calibration"))
    chosen = np.sort(rng.choice(len(rows), min(config.calibration_rows, len(rows)), replace=False))
    return torch.from_numpy(rows[chosen].astype(np.int64)).to(context.device)
