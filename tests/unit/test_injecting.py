"""Offers of items that were processed elsewhere: what the writer's core makes of them."""

from __future__ import annotations

import pytest
from tests.unit.test_recalling import CAT, DOG, VARIANT, U, compute, faults, key, offer, recalled
from tests.unit.test_writer_core import META, QUARTER, World, error

from mmprep.wire import messages

NAMED = b"n" * 32
OTHER = b"other metadata"


@pytest.fixture
def world():
    return World()


def injected(*, replace=False, nbytes=10):
    return messages.Injected(NAMED, "image", 1, nbytes, U, replace)


def sent(digest):
    return messages.Offered(key(digest), "image", 1, 10, messages.Alias(U, digest, NAMED))


def by_name(variant=VARIANT):
    return messages.Recalled(U, variant, "image", NAMED)


def inject(world, name, call, meta=META, *, replace=False, length=100):
    offer(world, name, call, injected(replace=replace))
    (want,) = world.wants(name, call)
    world.put(name, want.flight)
    world.fill(want.flight, length, meta)
    world.say(name, messages.Unpin(call))


def found(world, name, call, **terms):
    offer(world, name, call, by_name(), **terms)
    (answer,) = world.answer(name, call)
    world.say(name, messages.Unpin(call))
    return None if answer.fault else (answer.key, answer.meta)


def test_an_injected_item_is_found_by_its_name_through_any_frontend_and_counts_as_a_hit_there(world):
    inject(world, "f0", 1)
    assert world.counted("mmprep_mm_cache_queries_total") == 0
    for name in ("f0", "f1"):
        assert found(world, name, 2) == (NAMED, META)
        assert found(world, name, 3, need="plan") == (NAMED, META)
    assert world.counted("mmprep_mm_cache_queries_total") == world.counted("mmprep_mm_cache_hits_total") == 4
    assert world.idle()


def test_a_lane_is_told_that_it_has_only_to_copy(world):
    offer(world, "f0", 1, injected())
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    assert [task.need for task in world.tasks.values()] == ["injected"]


def test_what_is_there_is_answered_at_once_unless_it_is_to_be_replaced(world):
    inject(world, "f0", 1)
    offer(world, "f1", 1, injected())
    assert world.outcomes("f1", 1) == ["hit"]
    assert world.answer("f1", 1)[0].meta == META
    world.say("f1", messages.Unpin(1))
    inject(world, "f1", 2, OTHER, replace=True)
    assert found(world, "f0", 2) == (NAMED, OTHER)
    assert found(world, "f0", 3, need="plan") == (NAMED, OTHER)
    assert world.core.ring.stats().entries == 1


def test_who_has_leased_the_former_item_keeps_it(world):
    inject(world, "f0", 1)
    offer(world, "f0", 2, by_name(), lease="engine")
    lease = world.answer("f0", 2)[0].lease
    inject(world, "f1", 1, OTHER, replace=True)
    assert world.core.ring.leases.get(lease).owner == "engine"
    assert found(world, "f0", 3) == (NAMED, OTHER)


def test_the_former_item_stays_where_the_new_one_turns_out_to_be_wrong(world):
    inject(world, "f0", 1)
    offer(world, "f1", 1, injected(replace=True))
    (want,) = world.wants("f1", 1)
    world.put("f1", want.flight)
    assert found(world, "f0", 2) == (NAMED, META)
    world.fail(want.flight, error("InvalidRequest"))
    assert faults(world, "f1", 1) == ["InvalidRequest"]
    assert found(world, "f0", 3) == (NAMED, META)
    assert world.idle()


def test_who_waits_for_an_item_that_turns_out_to_be_wrong_is_told_that_nobody_has_it(world):
    offer(world, "f0", 1, injected())
    offer(world, "f1", 1, by_name())
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    world.fail(want.flight, error("InvalidRequest"))
    assert faults(world, "f0", 1) == ["InvalidRequest"]
    assert faults(world, "f1", 1) == ["NotFound"]
    assert found(world, "f0", 2, need="plan") is None


def test_content_that_is_sent_with_a_name_takes_the_place_of_what_was_injected_also_for_the_next_writer(world):
    inject(world, "f0", 1)
    compute(world, "f0", 2, sent(CAT))
    assert found(world, "f0", 3)[0] == key(CAT)
    world.core.aliases.clear()  # as in the next writer
    assert found(world, "f0", 4) is None
    assert found(world, "f0", 5, need="plan") is None


def test_an_injected_item_takes_the_place_of_content_that_was_sent_with_its_name_also_when_it_is_evicted(world):
    compute(world, "f0", 1, sent(CAT))
    inject(world, "f0", 2)
    assert found(world, "f0", 3) == (NAMED, META)
    assert world.core.ring.remove(NAMED)
    assert found(world, "f0", 4) is None
    offer(world, "f0", 5, messages.Offered(key(CAT), "image", 1, 10))
    assert world.outcomes("f0", 5) == ["hit"], "the content itself is still there"


def test_the_items_of_one_offer_mean_what_they_would_mean_one_after_the_other(world):
    inject(world, "f0", 1)
    compute(world, "f0", 2, messages.Offered(key(DOG), "image", 1, 10))
    offer(world, "f0", 3, by_name(), sent(DOG))
    assert [answer.meta for answer in world.answer("f0", 3)] == [META, META]
    assert world.outcomes("f0", 3) == ["hit", "hit"]
    world.say("f0", messages.Unpin(3))
    assert found(world, "f0", 4)[0] == key(DOG)


def test_a_name_without_its_injected_key_does_not_lead_to_it(world):
    inject(world, "f0", 1)
    offer(world, "f0", 2, recalled(U))
    offer(world, "f0", 3, recalled(NAMED))
    assert faults(world, "f0", 2) == faults(world, "f0", 3) == ["NotFound"]


def test_an_injected_item_never_travels_inline_and_leaves_nothing_where_there_is_no_room():
    world = World(inline=100_000)
    offer(world, "f0", 1, injected())
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER + 1) == "nowhere"
    assert faults(world, "f0", 1) == ["TooLarge"]
    assert found(world, "f0", 2, need="plan") is None
    assert world.idle()


def test_an_injected_item_that_is_too_large_for_the_ring_goes_beside_it():
    world = World(spill=1 << 20)
    offer(world, "f0", 1, injected())
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER + 1) == "spill"
    world.say("f0", messages.Unpin(1))
    assert found(world, "f0", 2) == (NAMED, META)
    offer(world, "f0", 3, by_name(), lease="engine")
    offer(world, "f0", 4, injected(replace=True))
    (want,) = world.wants("f0", 4)
    world.put("f0", want.flight)
    assert world.place(want.flight, QUARTER + 1, OTHER) == "spill"
    world.say("f0", messages.Unpin(4))
    assert found(world, "f0", 5) == (NAMED, OTHER)
    assert len(world.segments) == 2, "who has leased the former one reads it"
    inject(world, "f0", 6, META, replace=True)
    assert len(world.segments) == 1
    assert found(world, "f0", 7) == (NAMED, META)


def test_when_a_lane_dies_over_an_injected_item_another_one_copies_it(world):
    offer(world, "f0", 1, injected())
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    number = world.lane_of(want.flight)
    world.lane(number, messages.AskExtent(want.flight, 100), META)
    world.granted.pop(number)
    world.die(number)
    world.fill(want.flight)
    assert world.outcomes("f0", 1) == ["computed"]


def test_clearing_the_cache_takes_injected_items_too(world):
    inject(world, "f0", 1)
    world.say("f0", messages.Clear(2))
    assert found(world, "f0", 3, need="plan") is None
