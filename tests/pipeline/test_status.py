"""What is not complete is named, with the command that mends it."""

from pathlib import Path

from isotone.pipeline.status import explain_run


def test_what_is_stale_is_named_in_the_command_that_redoes_it() -> None:
    row = {"stage": 3, "name": "train_noise", "node": "match.noise", "state": "stale", "reason": "lr was 1, is now 2"}
    told = explain_run(Path("runs/tiny"), [row])
    assert told.startswith("match.noise is stale: lr was 1, is now 2; ")
    assert told.endswith("isotone run … --only match.noise --fresh")
