"""What would make an unsafe row safe: values to set, computed with the same formulas."""

import math

from isotone.cluster import Cluster
from isotone.config import Experiment
from isotone.pipeline.graph import Graph
from isotone.planning.memory import Machine, device_memory, host_memory
from isotone.planning.row import MARGIN, Row
from isotone.planning.sizes import Sizes
from isotone.planning.units import duration, size


def for_time(row: Row, sizes: Sizes, cluster: Cluster) -> str:
    """Return how a stage would fit its time limit."""
    assert row.expected is not None
    assert row.limit is not None
    share = row.limit * (1 - MARGIN) / row.expected
    jobs = math.ceil(row.expected / row.limit)
    parts = [f"a limit of {duration(row.expected / (1 - MARGIN))}"]
    if row.stage.startswith("train_"):
        parts.insert(
            0, f"at most {sizes.corpus.train_tokens * share:.2g} training tokens an epoch (data.num_documents)"
        )
        parts.append(f"{math.ceil(1 / share):,} times the devices (cluster.gpus, cluster.nodes)")
    elif row.stage != "setup":
        parts.insert(0, f"{share:.0%} of the documents or iterations")
    text = ", or ".join(parts)
    if jobs - 1 <= cluster.max_requeues:
        return f"{text}; as it is, it would go on by itself through {jobs - 1} requeues"
    return f"{text}; as it is, it would need {jobs - 1:,} requeues, and cluster.max_requeues is {cluster.max_requeues}"


def for_limit(row: Row) -> str:
    """Return how a job's limit would be accepted by its partition."""
    assert row.limit is not None
    return (
        f"ask for {duration(row.limit)} (cluster.stages.{row.stage}.time): the stage goes on under the same id where "
        "it needs longer; or a partition that allows more (cluster.max_time)"
    )


def for_device_memory(row: Row, sizes: Sizes, machine: Machine, device: str | None) -> str:
    """Return what would fit the device."""
    assert row.expected is not None
    assert row.limit is not None
    parts = [f"a device of {size(row.expected / (1 - MARGIN))} or more"]
    if row.stage.startswith("train_") and (found := _smaller_training(row, sizes, machine)):
        parts.insert(0, found)
    elif not row.stage.startswith("train_"):
        parts.insert(0, "smaller evaluation.batch_size, attacks.batch_documents or attacks.protocol")
    return ", or ".join(parts)


def for_host_memory(row: Row, sizes: Sizes, machine: Machine) -> str:
    """Return what would fit the host."""
    assert row.expected is not None
    assert row.limit is not None
    parts = [f"{size(row.expected / (1 - MARGIN))} (cluster.stages.{row.stage}.memory)"]
    if row.stage.startswith("train_") and machine.device == "cpu" and (found := _smaller_training(row, sizes, machine)):
        parts.insert(0, found)
    return ", or ".join(parts)


def for_disk(row: Row, num_seeds: int) -> str:
    """Return what would fit the disk."""
    assert row.expected is not None
    parts = [f"{size(row.expected / (1 - MARGIN))} of room (--out, cluster.free_disk)", "fewer documents"]
    if row.stage != "setup" and num_seeds > 1:
        parts.append(f"fewer than {num_seeds} seeds at a time (--seeds)")
    return ", or ".join(parts)


def _smaller_training(row: Row, sizes: Sizes, machine: Machine) -> str | None:
    """Return the first smaller way to train that fits: recomputed activations, then halved micro-batches."""
    assert row.limit is not None
    recipe = sizes.experiment.training
    nodes = [n for n in Graph(sizes.experiment).nodes if n.kind == "train" and f"train_{n.arm}" == row.stage]
    if not nodes:  # an arm that is made, not trained
        return None
    node = nodes[0]
    need = device_memory if row.resource == "device memory" else host_memory
    batch, rows = recipe.micro_batch * recipe.accumulation, recipe.micro_batch
    while rows >= 1:
        for recompute in dict.fromkeys((recipe.gradient_checkpointing, True)):
            values = {"micro_batch": rows, "accumulation": batch // rows, "gradient_checkpointing": recompute}
            tried = Sizes(_with_training(sizes.experiment, values), sizes.shape, sizes.corpus)
            bytes_needed = need(tried, machine, node)
            if bytes_needed is not None and bytes_needed <= row.limit * (1 - MARGIN):
                text = (
                    f"training.micro_batch: {rows}, training.accumulation: {batch // rows}"
                    if rows != recipe.micro_batch
                    else ""
                )
                more = (
                    "training.gradient_checkpointing: true" if recompute and not recipe.gradient_checkpointing else ""
                )
                return f"{', '.join(filter(None, (text, more)))} ({size(bytes_needed)})"
        rows //= 2
    return None


def _with_training(experiment: Experiment, values: dict[str, int | bool]) -> Experiment:
    return experiment.model_copy(update={"training": experiment.training.model_copy(update=values)})
