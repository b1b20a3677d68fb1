"""Random tokens in the prefix: only there, other ones in every step, with the true labels, and resumed bit for bit."""

from pathlib import Path

import pytest
import torch

from isotone.scoring import token_nll
from isotone.training import Budget, RandomPrefix
from training.tiny_run import RECIPE, VOCABULARY, outcome, tiny_model, train, train_in_budgets

ADMISSIBLE = torch.arange(50, VOCABULARY)
EDIT = RandomPrefix(0.3, range(1, 11), ADMISSIBLE, seed=1)
IDS = torch.randint(50, (6, 16), generator=torch.Generator().manual_seed(0))  # none is admissible, so edits show


def test_edits_lie_in_the_attackable_prefix_and_are_admissible() -> None:
    edited = EDIT(IDS, 3)
    changed = edited != IDS
    assert changed[:, 1:11].sum(1).tolist() == [3] * 6
    assert changed.sum() == 18
    assert torch.isin(edited[changed], ADMISSIBLE).all()
    assert not torch.equal(IDS, edited)


def test_edits_are_a_function_of_seed_step_and_row() -> None:
    edited = EDIT(IDS, 3)
    assert torch.equal(EDIT(IDS, 3), edited)
    assert torch.equal(EDIT(IDS[:2], 3), edited[:2])
    assert not torch.equal(EDIT(IDS, 4), edited)
    assert not torch.equal(RandomPrefix(0.3, range(1, 11), ADMISSIBLE, seed=2)(IDS, 3), edited)
    assert len({tuple(row) for row in (edited != IDS).tolist()}) > 1


def test_a_row_shorter_than_the_prefix_is_edited_within_itself() -> None:
    assert RandomPrefix(1.0, range(1, 40), ADMISSIBLE, seed=1)(IDS, 0).ge(50).sum() == 6 * 15


def test_labels_stay_the_true_tokens() -> None:
    """The loss is that of the unedited row behind the edited context, at every position."""
    model = tiny_model(0.0).eval()
    edited = EDIT(IDS, 0)
    with torch.no_grad():
        found = token_nll(model, edited, labels_BL=IDS)
        expected = -torch.log_softmax(model(edited).logits[:, :-1], -1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_whole_batch_is_edited_at_once_whatever_the_micro_batch(tmp_path: Path, micro_batch: int) -> None:
    seen = []

    def edit(ids_BL: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((step, len(ids_BL)))
        return EDIT(ids_BL, step)

    train(tmp_path, edit=edit, micro_batch=micro_batch, budget=Budget(max_epochs=None))
    assert seen == [(step, 4) for step in range(11)]


def test_interrupted_training_on_edited_rows_equals_uninterrupted(tmp_path: Path) -> None:
    train(tmp_path / "whole", edit=EDIT, recipe=RECIPE)
    assert train_in_budgets(tmp_path / "parts", "0.25", edit=EDIT, recipe=RECIPE) > 2
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    train(tmp_path / "plain", recipe=RECIPE)
    assert outcome(tmp_path / "plain") != outcome(tmp_path / "whole")


def test_training_in_segments_equals_training_at_once(tmp_path: Path) -> None:
    """What a repeated training that is measured in between rests on."""
    from training.tiny_run import trainer

    segments = trainer(tmp_path / "segments")
    steps = [segments.run(until).step for until in (3, 3, 8, 11)]
    assert steps == [3, 3, 8, 11]
    train(tmp_path / "whole")
    assert outcome(tmp_path / "segments") == outcome(tmp_path / "whole")
