"""A job is done when its records say so, and goes back into the queue only while that gets it further."""

import json
from pathlib import Path

import pytest

from isotone.config_io import load_experiment
from isotone.pipeline.resolve import resolve
from isotone.pipeline.run_directory import RunDirectory
from isotone.slurm.outcome import COMPLETE, GIVE_UP, REQUEUE, REQUEUED, End, decide, decide_summary, job_log
from isotone.slurm.queue import JobState

RUNNING = JobState("RUNNING", "None")
CANCELLED = JobState("COMPLETING", "None")
OUT_OF_TIME = JobState("COMPLETING", "TimeLimit")
PREEMPTED = JobState("RUNNING", "None", is_preempted=True)
STAGE = "train_baseline"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory.of(tmp_path, "pocket-quick", 42)
    resolve(load_experiment("pocket-quick"), found)
    return found


def requeue(run: RunDirectory, code: int = 75, state: JobState | None = RUNNING, maximum: int = 50) -> int:
    """Decide for job 9, and write it down as a job does."""
    decision = decide(run, STAGE, End(code, state=state, job_id="9"), maximum)
    line = {"stage": STAGE, "job_id": "9", "code": decision.code, "progress": decision.progress}
    job_log(run).append(line)
    return decision.code


def checkpoint(run: RunDirectory, step: int) -> None:
    (run.checkpoints("baseline") / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize("code", [75, 137, 143, 138])
def test_a_stopped_or_killed_job_is_requeued_as_long_as_it_gets_further(run: RunDirectory, code: int) -> None:
    for step in range(3):
        checkpoint(run, step)
        assert requeue(run, code) == REQUEUE


def test_a_job_that_does_nothing_between_two_requeues_gives_up(run: RunDirectory) -> None:
    checkpoint(run, 10)
    assert requeue(run) == REQUEUE
    decision = decide(run, STAGE, End(75, state=RUNNING, job_id="9"), 50)
    assert decision.code == GIVE_UP
    assert "nothing was done between two requeues" in decision.reason
    assert "cluster.time" in decision.reason


def test_a_smaller_micro_batch_counts_as_progress(run: RunDirectory) -> None:
    """Out of memory at the same step twice: the second attempt had halved it."""
    checkpoint(run, 10)
    assert requeue(run, 137) == REQUEUE
    (run.checkpoints("baseline").parent / "micro_batch.baseline.jsonl").write_text('{"step": 10, "micro_batch": 4}\n')
    assert requeue(run, 137) == REQUEUE
    assert requeue(run, 137) == GIVE_UP


def test_a_finished_document_counts_as_progress(run: RunDirectory) -> None:
    stage, rows = "hotflip", run.results / "documents" / "hotflip.baseline.once.jsonl"
    first = decide(run, stage, End(75, state=RUNNING, job_id="9"), 50).progress
    rows.parent.mkdir(parents=True)
    rows.write_text('{"id": 1}\n')
    assert decide(run, stage, End(75, state=RUNNING, job_id="9"), 50).progress != first


def test_requeues_are_capped(run: RunDirectory) -> None:
    for step in range(3):
        checkpoint(run, step)
        assert requeue(run, maximum=3) == REQUEUE
    checkpoint(run, 4)
    decision = decide(run, STAGE, End(75, state=RUNNING, job_id="9"), 3)
    assert decision.code == GIVE_UP
    assert "cluster.max_requeues" in decision.reason
    assert decide(run, STAGE, End(75, state=RUNNING, job_id="10"), 3).code == REQUEUE  # submitted again: another job


@pytest.mark.parametrize(
    ("code", "signal", "state", "cause"),
    [
        (75, "TERM", OUT_OF_TIME, "time limit"),
        (75, "USR1", RUNNING, "time limit"),
        (75, "none", PREEMPTED, "preemption"),
        (137, "none", RUNNING, "killed"),
        (1, "none", RUNNING, "failed"),
        (75, "TERM", CANCELLED, "cancelled"),
        (75, "none", RUNNING, "stopped"),
    ],
)
def test_time_limit_preemption_cancellation_and_failure_are_told_apart(
    run: RunDirectory, code: int, signal: str, state: JobState, cause: str
) -> None:
    checkpoint(run, 1)
    decision = decide(run, STAGE, End(code, signal, state, "9"), 50)
    assert decision.cause == cause
    assert (decision.code == REQUEUE) == (cause not in ("failed", "cancelled"))


@pytest.mark.parametrize("end", [End(0, state=RUNNING, job_id="9"), End(1, state=RUNNING, job_id="9", has_begun=False)])
def test_what_only_srun_ended_has_not_failed(run: RunDirectory, end: End) -> None:
    """srun ends with 0 where it has lost the node, and with 1 where it could not start the process."""
    checkpoint(run, 1)
    assert decide(run, STAGE, end, 50).code == REQUEUE


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "REQUEUED", "RUNNING"])
def test_a_job_that_slurm_has_put_back_is_neither_requeued_again_nor_given_up(run: RunDirectory, state: str) -> None:
    decision = decide(run, STAGE, End(0, state=JobState(state, "BeginTime", restarts=3), job_id="9", restarts=2), 50)
    assert (decision.code, decision.cause) == (REQUEUED, "node lost")


def test_a_stage_that_failed_has_failed_on_a_lost_node_too(run: RunDirectory) -> None:
    end = End(1, state=JobState("PENDING", "None", restarts=1), job_id="9")
    assert decide(run, STAGE, end, 50).code == GIVE_UP


def test_a_complete_stage_is_complete_whatever_ended_its_process(run: RunDirectory) -> None:
    """Killed after the record was written: nothing is left to do."""
    from isotone.pipeline.graph import Graph, Node
    from isotone.pipeline.record import write_record

    experiment = load_experiment(str(run.config))
    output = run.setup / "model.json"
    output.parent.mkdir(parents=True)
    output.write_text(json.dumps({}))
    write_record(run, Graph(experiment), experiment, 42, Node("setup"), [output], {})
    assert decide(run, "setup", End(137, state=RUNNING, job_id="9"), 50).code == COMPLETE


def test_preemptions_alone_never_make_a_job_give_up(run: RunDirectory) -> None:
    """They say nothing about the job: it may have had no time at all."""
    checkpoint(run, 10)
    for _ in range(3):
        assert requeue(run, 75, PREEMPTED) == REQUEUE


def test_a_summary_is_requeued_as_often_as_allowed() -> None:
    """A full disk stops it safely."""
    assert decide_summary(0, 3, 5).code == COMPLETE
    assert decide_summary(75, 4, 5).code == REQUEUE
    assert decide_summary(75, 5, 5).code == GIVE_UP
    assert decide_summary(4, 0, 5).code == GIVE_UP
