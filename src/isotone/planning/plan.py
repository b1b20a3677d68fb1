"""The plan: a row for each stage and resource, held against its limit, and what would make an unsafe one safe."""

from dataclasses import dataclass, replace
from pathlib import Path

from isotone import records
from isotone.cluster import LIGHT_STAGES, Cluster, duration_s, size_bytes
from isotone.config import Experiment
from isotone.config_recipes import with_recipes
from isotone.models.sources import resolve_source
from isotone.pipeline.graph import Graph
from isotone.pipeline.record import standing
from isotone.pipeline.run_directory import RunDirectory
from isotone.planning import advice, limits
from isotone.planning.corpus import CorpusSize, corpus_size, parse_tokens
from isotone.planning.disk import disk_peaks
from isotone.planning.memory import device_memory, host_memory
from isotone.planning.row import Row, judged
from isotone.planning.seconds import stage_seconds
from isotone.planning.shape import ModelShape, read_shape
from isotone.planning.sizes import Sizes, Work
from isotone.planning.target import Target, find_target, num_devices
from isotone.planning.work import node_work
from isotone.slurm.site import load_cluster, shipped_profiles


@dataclass(frozen=True)
class Plan:
    """An experiment's plan.

    Attributes:
        rows: stages in order, then what concerns the run as a whole.
        lines: what the figures rest on, for people.
    """

    rows: list[Row]
    lines: list[str]

    @property
    def unsafe(self) -> list[Row]:
        """The rows that do not fit."""
        return [row for row in self.rows if row.safe is False]


def make_plan(
    experiment: Experiment,
    site: str | None = None,
    out: Path = Path("runs"),
    seeds: list[int] | None = None,
    tokens: str | None = None,
) -> Plan:
    """Return what an experiment will take, against the limits of a site or of this machine.

    Args:
        experiment: what is planned.
        site: a site profile's name or file; None: the user's own, if there is one.
        out: folder that will hold all runs.
        seeds: runs side by side; the experiment's unless given.
        tokens: training tokens of one epoch; counted or estimated unless given.

    Raises:
        UsageError: model, corpus or site are not known.
    """
    planner = Planner(experiment, site, out, tuple(seeds or experiment.seeds), tokens)
    return planner.plan()


class Planner:
    """Puts a plan together; see ``make_plan``."""

    def __init__(self, experiment: Experiment, site: str | None, out: Path, seeds: tuple[int, ...], tokens: str | None):
        self.seeds = seeds
        self.cluster: Cluster = load_cluster(site, experiment.cluster)
        self.shape: ModelShape = read_shape(experiment.model)
        self.experiment = experiment = with_recipes(experiment, lambda: self.shape.kind)
        self.run = RunDirectory.of(out, experiment.name, seeds[0])
        # a profile that comes with isotone describes a cluster that this machine is no part of
        here = site not in shipped_profiles()
        self.target: Target = find_target(experiment, self.shape, self.cluster, here, self.run)
        wanted = parse_tokens(tokens) if tokens is not None else None
        self.corpus: CorpusSize = corpus_size(experiment.data, self.shape, self.run.data, wanted)
        self.sizes = Sizes(experiment, self.shape, self.corpus)
        self.graph = Graph(experiment)
        self.decided = self._decided() if self.run.config.is_file() and here else None
        self.maxima: dict[str | None, int | None] = {}
        self.nodes = {
            stage: [node for node in self.graph.nodes if self.graph.stage_of(node) == stage]
            for stage in self.graph.stages
        }

    def _decided(self) -> Experiment:
        """Return the experiment with what was decided when its run began, as records know it."""
        experiment, target = self.experiment, self.target
        runtime = experiment.runtime.model_copy(update={"device": target.device, "threads": target.threads})
        training = experiment.training.model_copy(update={"precision": target.precision})
        return experiment.model_copy(update={"runtime": runtime, "training": training})

    def plan(self) -> Plan:
        """Return the plan."""
        times = {row.stage: row for row in self._times()}
        memory = {stage: self._memory(stage) for stage in self.nodes}
        disk = self._disk()
        rows = [row for stage in self.nodes for row in (times[stage], *self._asked(stage), *memory[stage], disk[stage])]
        return Plan([*rows, *self._totals(times)], self._lines())

    # --- time --------------------------------------------------------------------------------------------------------

    def _times(self) -> list[Row]:
        done = {stage: seconds for stage in self.nodes if (seconds := self._recorded(stage)) is not None}
        return [self._time(stage, done) for stage in self.nodes]

    def _time(self, stage: str, done: dict[str, float]) -> Row:
        limit = limits.time_limit(self.cluster, stage)
        if stage in done:
            return Row(stage, "time", done[stage], limit, origin="measured: complete", safe=True)
        seconds, origin, firm = self._seconds(stage, done)
        if seconds is None:
            return Row(stage, "time", None, limit, origin="not checked: no rate; isotone plan … --measure gives one")
        row = judged(stage, "time", seconds, limit, origin, firm)
        return row.advised(advice.for_time(row, self.sizes, self.cluster)) if row.safe is False else row

    def _seconds(self, stage: str, done: dict[str, float]) -> tuple[float | None, str, bool | None]:
        """Return a stage's seconds, where they come from, and how firm they are."""
        if stated := self.cluster.resources(stage).expected_time:
            return duration_s(stated), "stated: expected_time", True
        if (by_record := self._by_records(stage, done)) is not None:
            return by_record, "measured: this run's records", True
        arm = self._trained(stage)
        recipe = self.experiment.training_of(arm) if arm else None
        save_bytes = 3.0 * self.sizes.weight_bytes(arm) if arm else 0.0
        seconds, origin, firm = stage_seconds(self._work(stage), self.target, recipe, save_bytes)
        return None if seconds is None else seconds / self._devices(stage), origin, firm

    def _devices(self, stage: str) -> int:
        """Return the devices that share a stage's work: only training is shared."""
        trains = any(node.kind == "train" for node in self.nodes[stage])
        return max(1, num_devices(self.cluster.resources(stage))) if trains else 1

    def _work(self, stage: str) -> Work:
        return sum((node_work(self.sizes, node) for node in self.nodes[stage]), Work())

    def _trained(self, stage: str) -> str | None:
        return next((node.arm for node in self.nodes[stage] if node.kind == "train" and node.arm), None)

    def _recorded(self, stage: str) -> float | None:
        """Return the seconds that a complete stage took; None where a node of it is not complete for these values."""
        if self.decided is None:
            return None
        total = 0.0
        for node in self.nodes[stage]:
            if standing(self.run, self.graph, self.decided, self.seeds[0], node).state != "complete":
                return None
            total += records.read_json(self.run.record(node))["provenance"]["seconds"]
        return total

    def _by_records(self, stage: str, done: dict[str, float]) -> float | None:
        """Return a training's seconds from those of another arm's, in proportion to their operations."""
        if not stage.startswith("train_") or not self._work(stage).train:
            return None
        for other, seconds in done.items():
            if other.startswith("train_") and (work := self._work(other).train):
                return seconds * self._work(stage).train / work
        return None

    def _asked(self, stage: str) -> list[Row]:
        """Return the row of a job's limit against its partition's, where both are known."""
        asked, partition = limits.time_limit(self.cluster, stage), self.cluster.resources(stage).partition
        if partition not in self.maxima:  # sinfo is asked once
            self.maxima[partition] = limits.partition_maximum(self.cluster, partition, self.target.here)
        allowed = self.maxima[partition]
        if asked is None or allowed is None:
            return []
        row = Row(stage, "time limit", asked, allowed, asked <= allowed, "stated: --time against the partition")
        return [row if row.safe else row.advised(advice.for_limit(row))]

    # --- memory and disk ---------------------------------------------------------------------------------------------

    def _memory(self, stage: str) -> list[Row]:
        resources, nodes = self.cluster.resources(stage), self.nodes[stage]
        devices = self._devices(stage)
        machine = replace(self.target.machine(self.experiment), devices=devices)
        stated = resources.expected_memory
        host = max(host_memory(self.sizes, machine, node) for node in nodes) * max(1, devices // (resources.nodes or 1))
        limit = limits.host_memory_limit(self.cluster, stage, self.target.here)
        origin = "stated: expected_memory" if stated else "computed"
        row = judged(stage, "host memory", size_bytes(stated) if stated else host, limit, origin)
        rows = [row.advised(advice.for_host_memory(row, self.sizes, machine)) if row.safe is False else row]
        on_device = [need for node in nodes if (need := device_memory(self.sizes, machine, node)) is not None]
        if on_device and stage not in LIGHT_STAGES:
            row = judged(stage, "device memory", max(on_device), limits.device_memory_limit(self.cluster), "computed")
            if row.safe is False:
                row = row.advised(advice.for_device_memory(row, self.sizes, machine, self.cluster.device.name))
            rows.append(row)
        return rows

    def _disk(self) -> dict[str, Row]:
        limit = limits.disk_limit(self.cluster, self.run.root.parent, self.target.here)
        at = resolve_source(self.experiment.model.source, self.experiment.model.gguf_file)
        peaks = disk_peaks(self.sizes, self.graph, len(self.seeds), cached=at.local)
        rows = {
            stage: judged(stage, "disk", peak, limit, f"computed; {self.corpus.origin}")
            for stage, peak in peaks.items()
        }
        return {
            s: row.advised(advice.for_disk(row, len(self.seeds))) if row.safe is False else row
            for s, row in rows.items()
        }

    # --- the whole ---------------------------------------------------------------------------------------------------

    def _totals(self, times: dict[str, Row]) -> list[Row]:
        """Return the longest chain of stages, and the device's and all seconds of all seeds."""
        ends: dict[str, float] = {}
        chain: dict[str, list[str]] = {}
        for stage in sorted(self.nodes, key=lambda name: self.graph.stages[name]):
            before = {
                self.graph.stage_of(needed) for node in self.nodes[stage] for needed in self.graph.needs[node]
            } - {stage}
            last = max((name for name in before if name in ends), key=lambda name: ends[name], default=None)
            ends[stage] = (ends[last] if last else 0.0) + (times[stage].expected or 0.0)
            chain[stage] = [*(chain[last] if last else []), stage]
        last = max(ends, key=lambda name: ends[name])
        unknown = [stage for stage, row in times.items() if row.expected is None]
        least = f"; at least: {', '.join(unknown)} not known" if unknown else ""
        total = sum(
            (row.expected or 0.0) * (1 if stage == "setup" else len(self.seeds)) for stage, row in times.items()
        )
        device = sum(
            (row.expected or 0.0) * max(1, num_devices(self.cluster.resources(stage))) * len(self.seeds)
            for stage, row in times.items()
            if stage not in (*LIGHT_STAGES, "constrain")
        )
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return [
            Row("critical path", "time", ends[last], None, origin=" → ".join(chain[last]) + least),
            Row("total", "device time", device, None, origin=f"{seeds}, stages that compute × their devices{least}"),
            Row("total", "time", total, None, origin=f"{seeds}, all stages one after another{least}"),
        ]

    def _lines(self) -> list[str]:
        target, shape, data = self.target, self.shape, self.experiment.data
        rate = target.rates.train
        speed = f"{rate / 1e12:.3g} TFLOP/s in training ({target.rate_origin})" if rate else "rate not known"
        sources = ", ".join(part.source for part in data.sources) or data.source
        lines = [
            f"model {shape.source}: {shape.num_parameters:,} parameters ({shape.origin})",
            f"data {sources}: {self.corpus.train_tokens:.3g} training tokens an epoch ({self.corpus.origin})",
            f"machine: {target.device}, {target.precision}, {target.threads} threads, {speed}",
        ]
        if target.bounded:
            lines.append(
                "evaluation and attacks compute in fp32, whose rate nobody stated (cluster.device.peak_tflops_fp32): "
                "their times are lower bounds, at the training's rate"
            )
        if rate and not target.host_measured:
            lines.append("loading and saving are not in the times of stages that compute: their rates are not known")
        return lines


def measure_rates(experiment: Experiment, site: str | None, out: Path, clock: str = "wall") -> Path:
    """Measure this machine's rates for an experiment, and keep them for plans.

    Returns:
        The file that they are kept in.

    Raises:
        UsageError: the model cannot be read or does not fit here.
    """
    from isotone.planning.measure import measure
    from isotone.planning.rates import keep, rates_key

    shape, run = read_shape(experiment.model), RunDirectory.of(out, experiment.name, experiment.seeds[0])
    cluster = load_cluster(site, experiment.cluster)
    target = find_target(experiment, shape, cluster, True, run)
    found = measure(experiment, target.device, target.precision, target.threads, clock)
    return keep(rates_key(experiment, shape, target.device, target.precision, target.threads), found)
