"""Attacks given models on given documents, and says what follows: the command ``isotone attack``."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from isotone import determinism, records
from isotone.config import Arm as ArmConfig
from isotone.config import MatchedLoss
from isotone.config_io import resolve_seed
from isotone.data.packing import separator_of
from isotone.data.shards import tokenize
from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.models import load_tokenizer
from isotone.pipeline.arms import bos_before_text
from isotone.pipeline.lease import lease
from isotone.pipeline.run_directory import RunDirectory
from isotone.report.summary import attack_summary_text
from isotone.result_models import AttackSuiteResults, to_json
from isotone.results import BASELINE
from isotone.robustness import Verdict
from isotone.suite.arm import Arm
from isotone.suite.documents import Documents, choose_documents, columns, encode_pair
from isotone.suite.request import ATTACKS, Options, Request, make_request, matched_name
from isotone.suite.results import build_results
from isotone.suite.standing import as_begun, require_same
from isotone.suite.work import Row, Work
from isotone.verdict import MAX_CLEAN_DIFFERENCE

RESULTS, SUMMARY = "attack_results.json", "attack_summary.txt"


def attack_models(
    models: str | Sequence[str],
    documents: Path | str,
    out: Path | str | None = None,
    *,
    attacks: Sequence[str] = ATTACKS,
    search_documents: Path | str | None = None,
    text_field: str = "text",
    prefix: int | None = None,
    gap: int | None = None,
    continuation: int | None = None,
    flips: int | None = None,
    budget_tokens: int | None = None,
    num_documents: int | None = None,
    matched_loss: bool = False,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    stop: StopFlag | None = None,
    say: Callable[[str], None] = lambda line: None,
    source_field: str | None = None,
    target_field: str | None = None,
) -> AttackSuiteResults:
    """Attack models without a pipeline; several are compared with the first one, on the same documents.

        results = isotone.attack_models(["pocket", "mono=./folder"], "texts.jsonl", "attacked", attacks=["hotflip"])
        print(results.arms["mono"].hotflip["delta_nll"], results.verdicts[0].sentence)

    One model at a time is in memory, in fp32. Interrupted, the same call goes on where it was and gives the same
    bytes. Device, threads and kernels of this process are set as in a run.

    Args:
        models: ``pocket``, folders, GGUF files or names on the hub, each also as NAME=MODEL. The first is ``baseline``.
        documents: txt, jsonl(.gz, .zst) or parquet.
        out: folder for logs, ``attack_results.json`` and ``attack_summary.txt``; None: nothing is kept.
        attacks: of hotflip, triggers, gcg, coordinate, pgd, frequency and random.
        search_documents: file for what is fitted (bar of success, margins, triggers); None: one in five
            documents of ``documents``.
        text_field: the field that holds the text.
        prefix: P, tokens 1…P−1 are attacked; by default what fits the smallest context, as for ``gap`` (neither
            attacked nor scored) and ``continuation`` (scored).
        gap: G.
        continuation: C.
        flips: most edited tokens a document.
        budget_tokens: forward tokens that a search may spend on a document.
        num_documents: attacked documents.
        matched_loss: add, for each model but the first, the better one of the two at the other's clean loss (logits
            divided by a temperature): without such a control there is no verdict where clean losses differ by more than
            .02 nats.
        overrides: ``key=value`` of an experiment's ``attacks``, ``analysis``, ``runtime``, … as for ``--set``.
        seed: of every random stream; EXPERIMENT_SEED or 42 unless given.
        stop: read wherever the work can stop safely.
        say: where lines for the user go.
        source_field: the field that an encoder-decoder reads and attacks edit; ``source`` unless given.
        target_field: the field that it is asked for, and scored; ``target`` unless given.

    Returns:
        What ``attack_results.json`` holds.

    Raises:
        Stopped: a stop was requested; the same call goes on from there.
        UsageError: models, documents or settings cannot be used, or ``out`` was begun with others.
        BlockedError: another process works in ``out``.
    """
    options = Options(
        tuple(attacks),
        text_field,
        prefix,
        gap,
        continuation,
        flips,
        budget_tokens,
        num_documents,
        matched_loss,
        tuple(overrides),
        source_field,
        target_field,
    )
    search = None if search_documents is None else Path(search_documents)
    request = make_request([models] if isinstance(models, str) else models, Path(documents), search, options)
    if out is None:
        with TemporaryDirectory() as scratch:
            return _run(request, seed, Path(scratch), stop or StopFlag(), say)
    return _run(request, seed, Path(out), stop or StopFlag(), say)


def _run(
    request: Request, given_seed: int | None, out: Path, stop: StopFlag, say: Callable[[str], None]
) -> AttackSuiteResults:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; give a folder")
    with lease(out / "leases" / "attack.json", f"attack in {out}"):
        experiment = as_begun(request.experiment, out)
        request, seed = replace(request, experiment=experiment), resolve_seed(experiment, given_seed)
        tokenizers = {arm: load_tokenizer(request.model(arm)) for arm in request.sources}
        tokenizer = tokenizers[BASELINE]
        documents = choose_documents(experiment, tokenizer, request.documents, request.search_documents)
        request = _without_empty_columns(request, tokenizer, documents)
        experiment = request.experiment
        _require_same_tokens(request, tokenizers, documents)
        require_same(out, request, documents, seed)
        for note in documents.notes:
            say(f"note: {note}")
        determinism.prepare(seed, int(experiment.runtime.threads or 1), experiment.runtime.device)
        work = Work(request, seed, tokenizer, bos_before_text(tokenizer), documents, RunDirectory(out), stop)
        if request.matched_loss:
            work = _with_controls(work)
        transfer = _measure_all(work)
        results = build_results(work, transfer)
        records.write_text(out / SUMMARY, attack_summary_text(results))
        records.write_json(out / RESULTS, to_json(results))
        records.sweep_directory(out / "work")
        if not request.matched_loss and any(_lacks_control(verdict) for verdict in results.verdicts):
            say("note: --matched-loss (matched_loss=True) adds the controls without which there is no verdict here")
    return results


def _lacks_control(verdict: Verdict) -> bool:
    return verdict.verdict == "not_concluded" and abs(verdict.clean_difference or 0) > MAX_CLEAN_DIFFERENCE


def _require_same_tokens(
    request: Request, tokenizers: Mapping[str, PreTrainedTokenizerBase], documents: Documents
) -> None:
    """Check that all tokenizers give the documents the same tokens, and tokens the same meaning.

    Raises:
        UsageError: one does not: documents could not be paired, nor edits transferred.
    """
    read, data = [*documents.test, *documents.search], request.experiment.data
    texts = [document.text for document in read]
    first = tokenizers[BASELINE]

    def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if data.pairs:
            return [encode_pair(document, data, tokenizer).ids.tolist() for document in read]
        return tokenize(texts, tokenizer)

    for arm, tokenizer in tokenizers.items():
        ids = [document.tokens.tolist() for document in read]
        same = _meaning(tokenizer) == _meaning(first) and (tokenizer is first or ids_of(tokenizer) == ids)
        if not same:
            raise UsageError(
                f"{arm}: {request.sources[arm]} does not read texts as the same tokens as {request.sources[BASELINE]} "
                "does, and models are compared on the same tokens; attack these one by one"
            )


def _meaning(tokenizer: PreTrainedTokenizerBase) -> object:
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = {token: i for token, i in tokenizer.get_vocab().items() if i not in special}
    return plain, bos_before_text(tokenizer), separator_of(tokenizer), tokenizer.bos_token_id


def _without_empty_columns(request: Request, tokenizer: PreTrainedTokenizerBase, documents: Documents) -> Request:
    """Return the request with no more columns for pairs than the longest needs, and a trigger before it."""
    experiment = request.experiment
    if not experiment.data.pairs:
        return request
    attacks = experiment.attacks
    needed = columns(documents, experiment.data, tokenizer.pad_token_id, attacks.triggers.length)
    limits = {"source": attacks.protocol.source, "target": attacks.protocol.target}
    fitting = {key: min(limits[key] or count, count) for key, count in needed.items()}
    protocol = attacks.protocol.model_copy(update=fitting)
    attacks = attacks.model_copy(update={"protocol": protocol})
    return replace(request, experiment=experiment.model_copy(update={"attacks": attacks}))


def _with_controls(work: Work) -> Work:
    """Add a control for each model but the first: of the two, the better one brought to the other's clean loss.

    A model can only be damaged, and who is worse is not known before both are measured.
    """
    losses = {}
    for name in work.request.sources:
        losses[name] = Arm(work, name).measure_clean()
        gc.collect()
    arms, of_first = dict(work.experiment.arms), losses[BASELINE]
    for name, loss in list(losses.items())[1:]:
        better = loss is not None and of_first is not None and loss < of_first
        start, to = (name, BASELINE) if better else (BASELINE, name)
        arms[matched_name(name)] = ArmConfig(
            start=start, train=False, matched_loss=MatchedLoss(to=to, by="temperature")
        )
    experiment = work.experiment.model_copy(update={"arms": arms})
    return replace(work, request=replace(work.request, experiment=experiment))


def _measure_all(work: Work) -> dict[str, list[Row]]:
    """Measure every arm, one model in memory at a time; return what edits of others did to each."""
    arms = work.experiment.arms
    for name, config in arms.items():  # controls come after the models that they are made from
        arm = Arm(work, name)
        if config.matched_loss:
            arm.match()
        work.stop.check(f"before {name}: the attack")
        arm.evaluate()
        arm.attack()
        arm.probe()
        if "triggers" in work.request.attacks:
            arm.trigger()
        del arm
        gc.collect()
    replayed: dict[str, list[Row]] = {}
    if work.experiment.attacks.transfer:
        for target in arms:
            arm = Arm(work, target)
            replayed[target] = arm.replay_all()
            del arm
            gc.collect()
    return replayed
