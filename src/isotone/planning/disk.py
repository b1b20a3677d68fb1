"""Room that a run takes on the disk at its fullest, stage by stage, over all seeds that are planned."""

from isotone.pipeline.graph import Graph
from isotone.planning.sizes import Sizes

SIGNATURE = 512
"""Bytes of a document's signature while the corpus is packed; as in data/splits.py."""

REPORT = 30_000_000
"""Bytes of a run's results, report, logs and records."""


def disk_peaks(sizes: Sizes, graph: Graph, num_seeds: int, cached: bool) -> dict[str, float]:
    """Return, for each stage, the bytes that lie there at most while it runs: its own and those of the stages before.

    Args:
        sizes: sizes of experiment, model and corpus.
        graph: the experiment's graph.
        num_seeds: runs side by side; they share the setup.
        cached: the model needs no copy in the hub's cache.
    """
    experiment, shape, corpus = sizes.experiment, sizes.shape, sizes.corpus
    model = 0 if cached else shape.stored_bytes
    held_out = sum(float(tokens.sum()) for tokens in corpus.document_tokens.values())
    token = 2 if shape.vocabulary <= 65_536 else 4
    packed = (
        token * (corpus.train_tokens + 2 * held_out) + 4 * held_out
    )  # rows, tokens, and the text of what is held out
    mean = max(1.0, held_out / max(1, sum(map(len, corpus.document_tokens.values()))))
    documents = (corpus.train_tokens + held_out) / mean
    shards = token * (corpus.train_tokens + held_out) + 4 * held_out + SIGNATURE * documents
    peaks = {"setup": model + packed + shards}
    shared, kept = model + packed, 0.0
    for stage in list(graph.stages)[1:]:
        peak = 0.0
        for node in (n for n in graph.nodes if graph.stage_of(n) == stage):
            weights = sizes.weight_bytes(node.arm) if node.arm else 0
            if node.kind in ("constrain", "match"):
                kept += weights
            if node.kind == "constrain":  # what a fitted start has made so far lies beside it
                constraint = experiment.arms[node.arm or ""].constraint
                peak = max(peak, kept + weights * (2 if constraint and constraint.calibrate else 1))
            matched = experiment.arms[node.arm].matched_loss if node.kind == "match" and node.arm else None
            if matched and matched.by == "undertrained":  # a training beside what it is measured at, while it lasts
                keep = experiment.training_of(experiment.arms[node.arm or ""].start).keep_last
                peak = max(peak, kept + 3 * weights * (keep + 2) + 4 * weights)
            if node.kind == "train":
                start = 0 if experiment.arms[node.arm or ""].held else weights
                keep = experiment.training_of(node.arm or "").keep_last
                peak = max(peak, kept + start + 3 * weights * (keep + 2))  # the last ones, the best, and one in writing
                kept += start + 2 * 3 * weights  # last and best stay
        peaks[stage] = shared + num_seeds * (max(peak, kept) + REPORT)
    return peaks
