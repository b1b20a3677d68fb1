"""A start that is killed goes on behind the last matrix, and is the same bit for bit as one that was not."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

from isotone.constraint import constrain
from isotone.constraint.constraint import Constraint
from isotone.constraint.journal import Journal
from isotone.pairs import PairLayout

ROWS = tokens(24, seed=3).clamp_min(1)


class KilledError(Exception):
    """In the place of a signal."""


def after(calls: int) -> Callable[[], None]:
    """Return a check that leaves at the given call."""
    left = [calls]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    return check


def start(model: Any, initialization: str, journal: Journal, calibrate: bool = False) -> Constraint:
    pairs = PairLayout(source=6, pad=0) if model.config.is_encoder_decoder else None
    scope = "gated_all" if model.config.model_type == "llama" else "mlp_both"
    return constrain(
        model,
        scope,
        "magnitude" if initialization == "nnls" else "projection",
        initialization,
        calibration_rows_NL=ROWS,
        pairs=pairs,
        calibrate=calibrate,
        journal=journal,
    )


STARTS = [("nnls", False), ("nnls", True), ("calibrated_shift", False), ("absolute", True)]


@pytest.mark.parametrize(
    ("name", "initialization", "calibrate"),
    [
        *((name, *made) for name in ("arcee", "llama", "gpt2", "t5") for made in STARTS),
        ("arcee", "rotated_nnls", False),
        ("llama", "rotated_nnls", False),
    ],
)
def test_a_start_that_is_left_again_and_again_ends_with_the_same_bits(
    name: str, initialization: str, calibrate: bool, tmp_path: Path
) -> None:
    whole = tiny_model(name)
    expected = start(whole, initialization, Journal(), calibrate)
    allowed, found = 30, None
    while found is None:
        model = tiny_model(name)
        with suppress(KilledError):
            found = start(model, initialization, Journal(tmp_path, check=after(allowed)), calibrate)
        allowed += 30  # further each time, as a single fit may take hundreds of sweeps
    assert allowed > 60
    assert found.fits == expected.fits
    for (key, one), two in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", ["arcee", "llama", "t5"])
@pytest.mark.parametrize(
    ("initialization", "calibrate"), [("nnls", True), ("calibrated_shift", False), ("absolute", True)]
)
def test_what_is_kept_is_not_made_again(name: str, initialization: str, calibrate: bool, tmp_path: Path) -> None:
    whole, again = tiny_model(name), tiny_model(name)
    expected = start(whole, initialization, Journal(tmp_path), calibrate)
    again.register_forward_pre_hook(lambda *_: pytest.fail("calibration text was read again"))
    assert start(again, initialization, Journal(tmp_path), calibrate).fits == expected.fits
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_process_with_next_to_no_time_still_comes_further(tmp_path: Path) -> None:
    """A budget that is over from the beginning: one step each, as with an epoch's share in training."""
    for made in range(1, 4):
        with pytest.raises(KilledError):
            start(tiny_model("arcee"), "nnls", Journal(tmp_path, check=after(0)))
        assert len(list(tmp_path.glob("model*"))) == made
    assert len(start(tiny_model("arcee"), "nnls", Journal(tmp_path, check=after(0))).fits) == 4


def test_what_was_fitted_in_a_basis_is_brought_back_into_that_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine eigenvectors come out with other signs, or as others where eigenvalues are close."""
    whole, again = tiny_model("arcee"), tiny_model("arcee")
    expected = start(whole, "rotated_nnls", Journal())
    with pytest.raises(KilledError):
        start(tiny_model("arcee"), "rotated_nnls", Journal(tmp_path, check=after(20)))
    assert len(list(tmp_path.glob("model*"))) < 4
    found = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: type(found(a))((found(a)[0], -found(a)[1])))
    assert start(again, "rotated_nnls", Journal(tmp_path)).fits == expected.fits
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    whole, again = tiny_model("arcee"), tiny_model("arcee")
    start(whole, "nnls", Journal(tmp_path))
    for path in tmp_path.glob("*/modules.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    start(again, "nnls", Journal(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("initialization", ["nnls", "calibrated_shift"])
def test_how_far_a_start_is_can_be_seen(initialization: str) -> None:
    seen: list[int] = []

    class Bar:
        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            seen.append(-1)

        def update(self, done: int, text: str = "") -> None:
            seen.append(done)

    asked: list[tuple[int, str]] = []

    def progress(total: int, unit: str) -> Bar:
        asked.append((total, unit))
        return Bar()

    start(tiny_model("arcee"), initialization, Journal(progress=progress))
    assert (asked, seen) == ([(4, "projection")], [1, 2, 3, 4, -1])
