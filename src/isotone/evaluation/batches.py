"""Fixed batches, computed one after the other, each durable before the next begins."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from isotone import records
from isotone.interruption import StopFlag

log = logging.getLogger(__name__)

T = TypeVar("T")
Batch = TypeVar("Batch")


def resumed(
    batches: Sequence[Batch],
    compute: Callable[[Batch], Sequence[T]],
    work: records.JsonLines,
    header: Mapping[str, Any],
    stop: StopFlag | None,
    report: Callable[[int, int], None],
) -> list[Sequence[T]]:
    """Return the results of each batch; those that are in ``work`` already are not computed again.

    Args:
        batches: what there is to do.
        compute: returns the results of a batch, as JSON.
        work: finished batches.
        header: what they depend on; those of another one are set aside.
        stop: read after each batch.
        report: called with the batches done and in all.

    Raises:
        Stopped: the stop flag asked for it; what is done is in ``work``.
    """
    digest = records.hash_json(dict(header))
    lines = work.read()
    if lines and lines[0].get("evaluation") != digest:
        log.warning("%s belongs to another model or other settings; it is set aside", work.path)
        records.set_aside(work.path)
        lines = []
    if not lines:
        work.append({"evaluation": digest})
    done: list[Sequence[T]] = [line["results"] for line in lines[1:]]
    for number, batch in enumerate(batches[len(done) :], len(done)):
        if stop:
            stop.check(f"evaluation (batch {number} of {len(batches)})")
        report(number, len(batches))
        results = list(compute(batch))
        work.append({"batch": number, "results": results})
        done.append(results)
    report(len(batches), len(batches))
    return done
