import numpy as np
import pytest

from isotone.data.order import batch_rows


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 8, 9, 64, 65, 1000, 4097])
def test_an_epoch_reads_every_row_exactly_once(num_rows: int) -> None:
    assert sorted(batch_rows(42, 3, 0, num_rows, num_rows)) == list(range(num_rows))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_batch_does_not_depend_on_how_the_epoch_is_cut(size: int) -> None:
    whole = batch_rows(42, 0, 0, 1000, 1000)
    cut = [batch_rows(42, 0, k, min(size, 1000 - k), 1000) for k in range(0, 1000, size)]
    assert np.array_equal(np.concatenate(cut), whole)


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(batch_rows(seed, epoch, 0, 500, 500)) for seed in range(-2, 5) for epoch in range(5)}
    assert len(orders) == 7 * 5


def test_the_order_never_changes_between_versions() -> None:
    assert batch_rows(42, 0, 0, 8, 1000).tolist() == GOLDEN
    assert batch_rows(42, 0, 0, 8, 1000).dtype == np.int64


def test_a_corpus_of_the_piles_size_costs_no_more() -> None:
    num_rows = 146_000_000
    rows = batch_rows(1, 0, num_rows - 32, 32, num_rows)
    assert len(set(rows.tolist())) == 32
    assert rows.min() >= 0
    assert rows.max() < num_rows


def test_orders_look_random() -> None:
    """Position and row are uncorrelated, neighbours do not stay together, and small orders reach every permutation."""
    order = batch_rows(5, 1, 0, 20_000, 20_000)
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001
    assert len({tuple(batch_rows(seed, 0, 0, 4, 4)) for seed in range(400)}) == 24


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (9, 2), (0, 11), (0, -1)])
def test_positions_past_the_epoch_are_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="epoch of 10 rows"):
        batch_rows(0, 0, first, count, 10)


GOLDEN = [351, 501, 244, 141, 771, 184, 402, 416]
