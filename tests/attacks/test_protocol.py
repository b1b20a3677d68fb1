"""The tokens that are attacked and scored are fixed by the documents alone."""

import numpy as np
import pytest

from isotone.attacks import PrefixProtocol, Window


def document(name: str, length: int) -> Window:
    return Window(name, np.arange(length, dtype=np.uint16))


def test_masks_are_those_of_the_protocol() -> None:
    protocol = PrefixProtocol()
    assert protocol.length == 136
    assert list(protocol.attackable) == list(range(1, 64))
    assert protocol.scored == slice(72, 136)
    assert protocol.buckets() == {
        "gap": slice(64, 72),
        "0-7": slice(72, 80),
        "8-31": slice(80, 104),
        "32+": slice(104, 136),
    }


def test_buckets_of_a_short_continuation_end_with_it() -> None:
    assert PrefixProtocol(4, 0, 10).buckets() == {"0-7": slice(4, 12), "8-31": slice(12, 14)}


def test_long_contexts_get_the_long_protocol() -> None:
    assert PrefixProtocol.for_context(512) == PrefixProtocol(64, 8, 64)
    assert PrefixProtocol.for_context(1024) == PrefixProtocol(256, 8, 256)


def test_short_documents_are_left_out_and_counted() -> None:
    protocol = PrefixProtocol(4, 1, 5)
    windows, num_short = protocol.cut([document("a", 9), document("b", 10), document("c", 30), document("d", 3)])
    assert [window.id for window in windows] == ["b", "c"]
    assert num_short == 2
    assert windows[1].tokens.dtype == np.int64
    assert windows[1].tokens.tolist() == list(range(10))


def test_cutting_stops_at_the_limit_without_counting_what_was_not_looked_at() -> None:
    windows, num_short = PrefixProtocol(4, 1, 5).cut([document("a", 10), document("b", 10), document("c", 3)], limit=2)
    assert [window.id for window in windows] == ["a", "b"]
    assert num_short == 0


def test_a_first_token_takes_the_place_that_is_never_edited() -> None:
    windows, num_short = PrefixProtocol(4, 1, 5).cut([document("a", 9), document("b", 8)], first_token=77)
    assert windows[0].tokens.tolist() == [77, *range(9)]
    assert num_short == 1


@pytest.mark.parametrize("values", [(1, 0, 1), (2, -1, 1), (2, 0, 0)])
def test_impossible_protocols_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="prefix ≥ 2, gap ≥ 0 and continuation ≥ 1"):
        PrefixProtocol(*values)
