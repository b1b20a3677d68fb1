"""A list of seeds is read the way one writes it, and nothing behind it is swallowed."""

import pytest

from isotone.arguments import spread_lists
from isotone.cli import run_command_line
from isotone.interruption import StopFlag


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("run x --seeds 42 1337 2024", "run x --seeds 42 --seeds 1337 --seeds 2024"),
        ("run x --seeds 42,1337 2024,", "run x --seeds 42 --seeds 1337 --seeds 2024"),
        ("run x --seeds=42,1337", "run x --seeds 42 --seeds 1337"),
        ("run x --seeds 42 --seeds 7", "run x --seeds 42 --seeds 7"),
        ("summarize --seeds 42 7 runs/x", "summarize --seeds 42 --seeds 7 runs/x"),
        ("run x --seeds 42 7 --out 5", "run x --seeds 42 --seeds 7 --out 5"),
        ("run x --seed 42 7", "run x --seed 42 7"),
        ("run x --seeds", "run x --seeds"),
        ("run x --seeds= --only 3", "run x --seeds= --only 3"),
        ("run x --seeds forty", "run x --seeds forty"),
        ("run -- --seeds 1 2", "run -- --seeds 1 2"),
    ],
)
def test_a_list_ends_where_its_numbers_end(written: str, read: str) -> None:
    assert spread_lists(written.split()) == read.split()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seed 1 --seeds 2 3", "either --seed or --seeds"),
        ("--seeds 2 3 2", "2 is given twice"),
        ("--seeds forty", "'--seeds': Input should be a valid integer"),
        ("--seeds", "requires an argument"),
        (f"--seeds 1 {2**63}", "0 to 2^63 - 1"),
    ],
)
def test_seeds_that_cannot_be_meant_are_refused(
    options: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert run_command_line(["run", "pocket-quick", "--out", str(tmp_path), *options.split()], StopFlag()) == 2
    assert said in capsys.readouterr().err
