"""What a frontend remembers of items."""

from __future__ import annotations

from mmprep.wire.messages import Alias, ItemAnswer, Recalled, Remembered
from mmprep_frontend.known import KnownItems
from mmprep_frontend.offered import OfferItem

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


NAME, VARIANT, OTHER = b"n" * 32, b"v" * 32, b"o" * 32


def sent(key, name=None):
    alias = None if name is None else Alias(name, bytes(32))
    return OfferItem(key, "image", b"medium", bytes(32), b"", 1, alias, VARIANT)


def recalled(name=NAME, variant=VARIANT):
    return Recalled(name, variant, "image", b"i" * 32)


def told(known, *asked, need="tensors", epoch="one"):
    found = known.recollect(asked, need, epoch)
    known.validate()
    return found and [(one.told, one.item.answer.generation) for one in found]


def test_all_items_of_a_request_are_recollected_or_none():
    known = KnownItems(1 << 20)
    known.note(A, PLACED, "meta", "one")
    known.note(B, PLANNED, "meta", "one")
    assert told(known, sent(A), sent(A)) == [(sent(A).offered(), 7)] * 2
    assert told(known, sent(A), sent(B)) is None
    assert told(known, sent(A), sent(B), need="plan") == [(sent(A).offered(), 0), (sent(B).offered(), 0)]
    assert told(known, sent(A), epoch="other") is None
    assert told(known, sent(C)) is None


def test_a_name_alone_is_recollected_as_the_item_that_it_stood_for_in_the_variant():
    known = KnownItems(1 << 20)
    known.note(A, PLACED, "meta", "one")
    assert told(known, recalled()) is None
    known.note_alias(NAME, VARIANT, A)
    remembered = Remembered(NAME, VARIANT, "image", A)
    assert told(known, recalled()) == [(remembered, 7)]
    assert told(known, sent(A, OTHER), recalled()) == [(sent(A, OTHER).offered(), 7), (remembered, 7)]
    assert told(known, recalled(variant=OTHER)) is told(known, recalled(OTHER)) is None
    known.note_alias(NAME, VARIANT, B)
    assert told(known, recalled()) is None


def test_a_name_that_comes_alone_and_then_with_a_medium_is_not_recollected():
    """What it stood for before is for the writer to say, once."""
    known = KnownItems(1 << 20)
    known.note(A, PLACED, "meta", "one")
    known.note_alias(NAME, VARIANT, A)
    assert told(known, recalled(), sent(A, NAME)) is None


def test_the_names_that_were_not_used_for_longest_are_forgotten():
    known = KnownItems(1 << 20, max_aliases=2)
    known.note(A, PLACED, "meta", "one")
    for name in (NAME, OTHER):
        known.note_alias(name, VARIANT, A)
    assert told(known, recalled(NAME))
    known.note_alias(C, VARIANT, A)
    assert [told(known, recalled(name)) is None for name in (NAME, OTHER, C)] == [False, True, False]
