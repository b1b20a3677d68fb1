"""The files of a sweep: its table as data and as Markdown, and an experiment with the best settings."""

import json
from collections.abc import Callable, Sequence

from isotone import records
from isotone.config import Experiment
from isotone.config_io import dump_yaml, experiment_from_dict
from isotone.report.tables import MISSING, Table, interval, number
from isotone.result_models import SweepResults, SweptPoint, to_json
from isotone.sweep.attacked import with_remainders
from isotone.sweep.figure import sweep_figure
from isotone.sweep.points import BASELINE, Point, SweepDirectory, best_of
from isotone.sweep.results import build_results


def write_results(
    directory: SweepDirectory, experiment: Experiment, points: Sequence[Point], say: Callable[[str], None]
) -> SweepResults:
    """Write what the sweep found: sweep.json, sweep.md, sweep.svg and, once every point has ended, best.yaml.

    A best.yaml that no longer stands for what was found is set aside.
    """
    results = with_remainders(build_results(directory, experiment, points), directory, experiment, points)
    text = sweep_markdown(results)
    complete = set(results.chosen) == {point.arm for point in points}
    best = best_experiment(experiment, results, points) if complete else None
    if directory.best.is_file() and directory.best.read_text(encoding="utf-8") != best:
        say(f"{directory.best} is of other points; set aside as {records.set_aside(directory.best).name}")
    if best and not directory.best.is_file():
        records.write_text(directory.best, best)
    records.write_text(directory.root / "sweep.md", text)
    if figure := sweep_figure(results):
        records.write_text(directory.root / "sweep.svg", figure)
    records.write_json(directory.table, to_json(results))  # last: what says that all of it is there
    say(text)
    return results


def best_experiment(experiment: Experiment, results: SweepResults, points: Sequence[Point]) -> str:
    """Return the experiment, as YAML, with the chosen settings of every swept arm; all else is as it was."""
    best = best_of(experiment, results.chosen, points)
    text = dump_yaml(best)
    assert experiment_from_dict(best.model_dump(mode="json")) == best  # what is written can be run
    return text


def sweep_markdown(results: SweepResults) -> str:
    """Return the table as Markdown: each arm's points by their loss, then those that have no figure."""
    arms = list(dict.fromkeys(point.arm for point in results.points))
    axes = list(dict.fromkeys(key for point in results.points for key in point.settings))
    measured = sorted((p for p in results.points if p.nll is not None), key=lambda p: (arms.index(p.arm), p.nll))
    table = Table(
        caption="Points",
        columns=("point", *axes, "perplexity", "ratio", "95 %", "certificate", "chosen", "remainder, nats"),
        rows=[_row(point, axes, results) for point in measured],
        text_columns=frozenset(range(len(axes) + 1)),
    )
    searched = ", ".join(f"{arm} {results.searched.get(arm, 0)}" for arm in arms)
    lines = [
        f"# Sweep of {results.experiment}, seed {results.seed}\n",
        f"Perplexity on validation text, {results.checkpoint} checkpoint; ratio to the best {BASELINE}, paired by "
        f"document. Complete points: {searched}.\n",
        table.markdown(),
        *(f"{note}\n" for note in results.notes),
    ]
    if others := [point for point in results.points if point.nll is None]:
        lines.append("".join(f"- {p.id} ({_settings(p)}): {p.state}: {p.reason}\n" for p in others))
    return "\n".join(lines)


def _row(point: SweptPoint, axes: Sequence[str], results: SweepResults) -> list[str]:
    ratio = point.ratio
    return [
        point.id,
        *(_value(point.settings[key]) if key in point.settings else "" for key in axes),
        number(point.perplexity),
        number(ratio.value) if ratio else MISSING,
        interval(ratio.ci95) if ratio else MISSING,
        point.certificate or "",
        "chosen" if point.id in results.chosen.values() else point.reason,
        "; ".join(f"{r.control} {number(r.value)} {interval(r.ci95)}" for r in point.remainders),
    ]


def _settings(point: SweptPoint) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in point.settings.items())


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
