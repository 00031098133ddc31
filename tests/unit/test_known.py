"""What a frontend remembers of items."""

from __future__ import annotations

from mmprep.wire.messages import ItemAnswer
from mmprep_frontend.known import KnownItems

A, B, C = (bytes([n]) * 32 for n in range(3))
PLACED = ItemAnswer("computed", 3, 4096, 640, 7, lease=bytes(16), meta=b"m" * 50, spill=b"s" * 16)
PLANNED = ItemAnswer("computed", meta=b"m" * 50)


def test_an_item_with_a_place_is_known_as_a_hit_in_its_epoch_and_as_a_plan_in_any():
    known = KnownItems(1 << 20)
    known.note(A, PLACED, "meta", "one")
    assert known.get(A, "tensors", "one") == (
        ItemAnswer("hit", 3, 4096, 640, 7, meta=b"m" * 50, spill=b"s" * 16),
        "meta",
        "one",
    )
    assert known.get(A, "tensors", "other") is None
    assert known.get(A, "plan", "other").answer == ItemAnswer("hit", meta=b"m" * 50)
    assert known.get(B, "plan", "one") is None


def test_a_plan_is_no_place_and_takes_none_away():
    known = KnownItems(1 << 20)
    known.note(A, PLANNED, "meta", "one")
    assert known.get(A, "tensors", "one") is None
    assert known.get(A, "plan", "one").answer == ItemAnswer("hit", meta=b"m" * 50)
    known.note(A, PLACED, "meta", "one")
    known.note(A, PLANNED, "meta", "one")
    assert known.get(A, "tensors", "one").answer.generation == 7
    known.validate()


def test_the_least_recently_used_are_forgotten_and_what_is_too_large_is_not_kept():
    known = KnownItems(4000)
    for key in (A, B):
        known.note(key, PLACED, "meta", "one")
    known.get(A, "plan", "one")
    known.note(C, PLACED, "meta", "one")
    assert [known.get(key, "plan", "one") is None for key in (A, B, C)] == [False, True, False]
    known.note(A, ItemAnswer("hit", 3, 0, 1, 8, meta=bytes(4000)), "meta", "one")
    assert known.get(A, "plan", "one") is None
    assert len(known) == 1
    known.validate()
