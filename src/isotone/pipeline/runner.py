"""Runs the nodes of a run in order: skips what is complete, refuses what is stale, continues what is partial."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.environment import gpu_line, provenance, require_platform
from isotone.errors import BlockedError, Stopped, UsageError
from isotone.interruption import StopFlag
from isotone.launch import World, world_of
from isotone.pipeline.context import Context, Stage
from isotone.pipeline.graph import DERIVED, FURTHER_ATTACKS, MEASURES, Graph, Node
from isotone.pipeline.lease import lease
from isotone.pipeline.record import Standing, standing, write_record
from isotone.pipeline.resolve import resolve
from isotone.pipeline.run_directory import ExperimentDirectory, RunDirectory
from isotone.pipeline.seeds import why_incomplete
from isotone.training.budget import Budget
from isotone.training.distributed import ALONE, Team, end_team, start_team

_LIGHT = {"setup", "aggregate"}
"""Kinds whose results do not depend on the device."""


@dataclass
class Request:
    """What ``isotone run`` was asked for."""

    experiment: Experiment
    run: RunDirectory
    seed: int
    until: str | None = None
    only: str | None = None
    fresh: bool = False
    max_epochs: Fraction | None = None
    max_minutes: float | None = None


def run_nodes(
    request: Request, stop: StopFlag, say: Callable[[str], None] = print, budget: Budget | None = None
) -> None:
    """Bring every requested node to completion.

    Args:
        request: what was asked for.
        stop: read wherever a node can stop safely.
        say: where lines for the user go.
        budget: what this process may spend on training; that of the request unless given.

    Raises:
        Stopped: a part was saved; run again to continue.
        BlockedError: something that a requested node needs is missing, stale or held by another process.
        UsageError: the configuration contradicts what stands in the run's folder, or this is no Linux or macOS.
    """
    require_platform()
    world = world_of()
    graph = Graph(request.experiment)
    chosen = _chosen(graph, request)
    budget = budget or Budget(request.max_epochs, request.max_minutes)
    team = _team(request, chosen, graph, world) if world.size > 1 else ALONE
    try:
        _run_chosen(request, graph, chosen, stop, say if team.is_first else lambda line: None, budget, team)
        team.gather(None)  # nobody leaves before all is written: a launcher ends the others when one has gone
    finally:
        end_team()


def _run_chosen(
    request: Request,
    graph: Graph,
    chosen: list[Node],
    stop: StopFlag,
    say: Callable[[str], None],
    budget: Budget,
    team: Team,
) -> None:
    computes = any(node.kind not in _LIGHT for node in chosen)
    experiment = team.first_then_others(lambda: resolve(request.experiment, request.run, computes=computes))
    if request.fresh:
        team.first(lambda: _set_aside_all(request.run, graph, chosen, say))
    _prepare_torch(experiment, request.seed, computes)
    for node in chosen:
        context = Context(experiment, graph, request.run, request.seed, node, stop, budget, say, team)
        if node.kind == "train":
            _bring_to_completion(context)
        else:  # where an arm starts from another one's end, its constrain node belongs to its training stage
            team.first(lambda: _bring_to_completion(replace(context, team=ALONE)))  # noqa: B023 - called at once


def _team(request: Request, chosen: list[Node], graph: Graph, world: World) -> Team:
    """Bring several processes together, or refuse to, where one does the work."""
    stages = {graph.stage_of(node) for node in chosen}
    if len(stages) > 1 or not any(node.kind == "train" for node in chosen):
        error = UsageError(
            f"{world.size} processes were started, but only training is shared by several: give --only train_baseline "
            f"(or another train stage), and run the other stages in one process"
        )
        error.told = world.rank > 0
        raise error
    from isotone.determinism import resolve_device

    return start_team(world, resolve_device(request.experiment.runtime.device))


def run_seeds(requests: Sequence[Request], stop: StopFlag, say: Callable[[str], None] = print) -> Path:
    """Run one seed after the other in this process, with one budget for all, then summarize them.

    Args:
        requests: of one experiment, one a seed, alike but for the seed.
        stop: as in ``run_nodes``, as is ``say``.

    Returns:
        The summary, or the experiment's folder where only some stages were asked for and seeds are not complete yet.

    Raises:
        IsotoneError: as ``run_nodes`` and ``summarize_seeds``; seeds after the one that raised it were not begun.
    """
    from isotone.pipeline.summary import summarize_seeds

    first, directory = requests[0], ExperimentDirectory(requests[0].run.root.parent)
    budget = Budget(first.max_epochs, first.max_minutes)
    for request in requests:
        say(f"seed {request.seed}")
        run_nodes(request, stop, say, budget)
    seeds = [request.seed for request in requests]
    if (first.until or first.only) and any(why_incomplete(directory.run(seed), seed) for seed in seeds):
        say("summary: not written, as it needs all stages of all seeds")
        return directory.root
    return summarize_seeds(directory.root, seeds, say)


def _chosen(graph: Graph, request: Request) -> list[Node]:
    if request.only and request.until:
        raise UsageError("give either --only or --until, not both")
    if request.only:
        return graph.find_nodes(request.only)
    if request.until:
        last = graph.stages[graph.find_stage(request.until)]
        return [node for node in graph.nodes if graph.stage_number(node) <= last]
    return graph.nodes


def _bring_to_completion(context: Context) -> None:
    if not context.team.first(lambda: _is_due(context)):
        return
    with ExitStack() as held:
        held_by_all = lease(context.run.lease(context.node), str(context.node))
        context.team.first(lambda: held.enter_context(held_by_all))
        # another run may have finished it while this one waited for the lease
        if not context.team.first(lambda: _is_complete(context)):
            _attempt(context)


def _is_due(context: Context) -> bool:
    if _is_complete(context):
        context.say(f"{context.node}: complete")
        return False
    _require_upstream(context)
    context.stop.check(f"before {context.node}: nothing of it had begun; the run")
    return True


def _is_complete(context: Context) -> bool:
    now = _standing(context, context.node)
    if now.state == "complete":
        return True
    if now.state == "stale" and context.node.kind not in DERIVED:
        stage = context.graph.stage_of(context.node)
        alone = str(context.node) if context.node.kind in (*MEASURES, stage) else stage
        raise (UsageError if now.by_config else BlockedError)(
            f"{context.node} is complete for another configuration or input ({now.reason}); "
            f"undo the change, choose another --out or name, or set the old result aside: "
            f"isotone run … --only {alone} --fresh"
        )
    return False


def _require_upstream(context: Context) -> None:
    for needed in context.graph.needs[context.node]:
        now = _standing(context, needed)
        if now.state != "complete":
            stage = context.graph.stage_of(needed)
            raise BlockedError(
                f"{context.node} needs {needed}, which is {now.state} ({now.reason}); "
                f"run stage {stage} first: isotone run … --until {stage}"
            )


def _standing(context: Context, node: Node) -> Standing:
    return standing(context.run, context.graph, context.experiment, context.seed, node)


def _attempt(context: Context) -> None:
    node, team, log = context.node, context.team, records.JsonLines(context.run.attempts)
    note: Callable[..., object] = log.append if team.is_first else lambda line: None
    context.say(f"{node}: starts · {gpu_line()}")
    started = time.time()
    entry: dict[str, Any] = {"node": str(node), "pid": os.getpid(), "started": started}
    note({**entry, "outcome": "started"})
    timer = _wall_clock(context)
    try:
        team.first(lambda: _forget_other_work(context))
        outputs = _stage(node)(context)
        team.first(lambda: _write_record(context, outputs, started))
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        ended = {"ended": time.time(), "outcome": _outcome(error), "exit_code": code, "error": type(error).__name__}
        note({**entry, **ended, "reason": str(error) or repr(error)})
        raise
    finally:
        timer.cancel()
    note({**entry, "ended": time.time(), "outcome": "complete"})
    if team.is_first:
        shutil.rmtree(context.run.work(node), ignore_errors=True)
    context.say(f"{node}: complete after {time.time() - started:.1f} s")


def _write_record(context: Context, outputs: list[Path], started: float) -> None:
    found = {**provenance(context.run.root), "started": started, "seconds": time.time() - started}
    if context.team.size > 1:
        found["processes"] = context.team.size
    write_record(context.run, context.graph, context.experiment, context.seed, context.node, outputs, found)


def _forget_other_work(context: Context) -> None:
    """Set aside unfinished results of another configuration or input; training and setup tell their own apart."""
    run, node = context.run, context.node
    identity = {"configuration": context.config_hash, "inputs": context.inputs_hash}
    path = run.work(node) / "identity.json"
    measures = node.kind in ("match", *MEASURES)
    if measures and not (path.is_file() and records.read_json(path) == identity):
        for place in run.found_by(node):
            context.say(f"{node}: {place} belongs to other settings; set aside as {records.set_aside(place).name}")
    records.write_json(path, identity)


def _outcome(error: BaseException) -> str:
    if isinstance(error, Stopped):
        return "partial"
    return "blocked" if isinstance(error, BlockedError) else "failed"


def _wall_clock(context: Context) -> threading.Timer:
    """Ask for a stop when the minutes of this process are used up, whatever stage it is in."""
    left_s = context.budget.seconds_left()
    delay_s = threading.TIMEOUT_MAX if left_s is None else max(0.0, left_s)
    timer = threading.Timer(delay_s, context.stop.request, ["--max-minutes-per-run"])
    timer.daemon = True
    timer.start()
    return timer


def _stage(node: Node) -> Stage:
    name = "further_attacks" if node.kind in FURTHER_ATTACKS else node.kind
    return import_module(f"isotone.pipeline.stages.{name}").run


def _prepare_torch(experiment: Experiment, seed: int, computes: bool) -> None:
    from isotone import determinism

    device = determinism.resolve_device(experiment.runtime.device) if computes else "cpu"
    determinism.prepare(seed, determinism.resolve_threads(experiment.runtime.threads), device)


def _set_aside_all(run: RunDirectory, graph: Graph, nodes: list[Node], say: Callable[[str], None]) -> None:
    """Rename everything that nodes have left, so that they start from nothing and nothing is lost.

    Raises:
        BlockedError: somebody works on one of them; then nothing is renamed.
    """
    with ExitStack() as held:
        for node in nodes:
            held.enter_context(lease(run.lease(node), str(node)))
        for node in nodes:
            _set_aside_node(run, graph, node, say)


def _set_aside_node(run: RunDirectory, graph: Graph, node: Node, say: Callable[[str], None]) -> None:
    for place in [run.record(node), *run.found_by(node)]:
        _set_aside(place, node, say)
    if node.kind == "setup":
        for place in (run.data, run.pinned_model, run.setup / "settings.json"):
            _set_aside(place, node, say)
    if node.kind in ("constrain", "train", "match") and node.arm:
        aside = _set_aside(run.checkpoints(node.arm), node, say)
        start, before = run.start(node.arm), Node("constrain", node.arm)
        if aside and node.kind == "train" and before in graph.nodes and (aside / start.name).exists():
            start.parent.mkdir()  # among a training's checkpoints stands what stage 1 has put out
            os.rename(aside / start.name, start)


def _set_aside(place: Path, node: Node, say: Callable[[str], None]) -> Path | None:
    if not place.exists():
        return None
    aside = records.set_aside(place)
    say(f"{node}: {place} set aside as {aside.name}")
    return aside
