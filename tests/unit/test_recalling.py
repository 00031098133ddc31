"""Offers of content that its frontend does not have, but knows an alias of: what the writer's core makes of them."""

from __future__ import annotations

import pytest
from tests.unit.test_writer_core import META, QUARTER, UPLOAD_SECONDS, World, error

from mmprep.keys import item_key
from mmprep.wire import messages

VARIANT, FLOATS = b"v" * 32, b"f" * 32
CAT, DOG = b"c" * 32, b"d" * 32
U, V = b"u" * 32, b"w" * 32


@pytest.fixture
def world():
    return World()


def key(digest, variant=VARIANT):
    return item_key(variant, digest)


def sent(digest, alias=None, variant=VARIANT):
    return messages.Offered(
        key(digest, variant), "image", 1, 10, None if alias is None else messages.Alias(alias, digest)
    )


def recalled(alias, variant=VARIANT):
    return messages.Recalled(alias, variant, "image")


def offer(world, name, call, *items, need="tensors", lease=None, seconds=100):
    to = None if lease is None else messages.LeaseTo(lease, "view")
    world.say(name, messages.Offer(call, need, seconds * 1000, 0, items, to))


def compute(world, name, call, *items, **terms):
    """Offer, upload and fill; let go of what was answered."""
    offer(world, name, call, *items, **terms)
    for want in world.wants(name, call):
        world.put(name, want.flight)
        if terms.get("need") == "plan":
            world.lane(world.lane_of(want.flight), messages.Planned(want.flight), META)
            world.tasks.pop(world.lane_of(want.flight))
        else:
            world.fill(want.flight)
    world.say(name, messages.Unpin(call))


def faults(world, name, call):
    return [None if item.fault is None else item.fault.kind for item in world.answer(name, call)]


# --- what is found ------------------------------------------------------------------------------------------------------


def test_content_is_found_by_the_alias_it_was_sent_with_through_any_frontend_and_its_key_is_told(world):
    compute(world, "f0", 1, sent(CAT, U))
    for name in ("f0", "f1"):
        offer(world, name, 2, recalled(U))
        (answer,) = world.answer(name, 2)
        assert (answer.outcome, answer.key, answer.meta) == ("hit", key(CAT), META)
        assert world.core.ring.in_ring(key(CAT)).generation == answer.generation
        world.say(name, messages.Unpin(2))
    assert world.idle()


def test_an_item_that_was_not_recalled_comes_without_its_key(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(CAT, U), recalled(U))
    assert [answer.key for answer in world.answer("f0", 2)] == [None, key(CAT)]


def test_an_alias_that_nobody_sent_is_found_nowhere_and_nothing_is_asked_for_or_pinned(world):
    offer(world, "f0", 1, recalled(U))
    (answer,) = world.answer("f0", 1)
    assert (answer.outcome, answer.fault.kind, answer.key) == ("failed", "NotFound", None)
    assert not world.wants("f0", 1)
    assert world.idle()


@pytest.mark.parametrize("name", [CAT, key(CAT), VARIANT], ids=["the digest", "the key", "the variant"])
def test_an_alias_that_equals_what_identifies_content_leads_nowhere(world, name):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, recalled(name))
    assert faults(world, "f0", 2) == ["NotFound"]


def test_what_is_processed_in_another_way_is_another_item(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, recalled(U, FLOATS))
    assert faults(world, "f0", 2) == ["NotFound"]
    compute(world, "f0", 3, sent(CAT, None, FLOATS))
    offer(world, "f0", 4, recalled(U, FLOATS))
    assert world.answer("f0", 4)[0].key == key(CAT, FLOATS)


def test_evicted_content_is_gone_until_somebody_sends_it_again(world):
    compute(world, "f0", 1, sent(CAT, U))
    assert world.core.ring.remove(key(CAT))
    offer(world, "f0", 2, recalled(U))
    assert faults(world, "f0", 2) == ["NotFound"]
    compute(world, "f1", 1, sent(CAT))
    offer(world, "f0", 3, recalled(U))
    assert world.outcomes("f0", 3) == ["hit"]


def test_a_plan_is_recalled_where_only_a_plan_is_there_and_tensors_are_not(world):
    compute(world, "f0", 1, sent(CAT, U), need="plan")
    offer(world, "f0", 2, recalled(U), need="plan")
    (answer,) = world.answer("f0", 2)
    assert (answer.outcome, answer.meta, answer.length, answer.key) == ("hit", META, 0, key(CAT))
    offer(world, "f0", 3, recalled(U))
    assert faults(world, "f0", 3) == ["NotFound"]


def test_a_recalled_item_is_leased_like_any_other(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, recalled(U), lease="engine")
    assert world.core.ring.leases.get(world.answer("f0", 2)[0].lease).owner == "engine"


def test_a_recalled_item_beyond_what_the_call_may_pin_has_to_be_sent(world):
    for digest, alias in ((CAT, U), (DOG, V), (b"e" * 32, b"x" * 32)):
        offer(world, "f0", digest[0], sent(digest, alias))
        (want,) = world.wants("f0", digest[0])
        world.put("f0", want.flight)
        assert world.place(want.flight, QUARTER - 64) == "ring"
        world.say("f0", messages.Unpin(digest[0]))
    offer(world, "f0", 1, recalled(U), recalled(V), recalled(b"x" * 32))
    assert faults(world, "f0", 1) == [None, None, "NotFound"]
    assert world.idle()


def test_recalled_items_are_counted_as_queries_and_found_ones_as_hits(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, recalled(U), recalled(U), recalled(V))
    assert world.counted("mmprep_mm_cache_queries_total") == 4
    assert world.counted("mmprep_mm_cache_hits_total") == 2


# --- what is on its way -------------------------------------------------------------------------------------------------


def test_content_on_its_way_is_waited_for(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U), recalled(U))
    assert world.answer("f1", 1) is None
    assert not world.wants("f1", 1)
    world.put("f0", 1)
    world.fill(1)
    assert [(a.outcome, a.key) for a in world.answer("f1", 1)] == [("joined", key(CAT))] * 2
    assert world.counted("mmprep_mm_cache_hits_total") == 2
    assert world.counted("mmprep_singleflight_joins_total") == 1


def test_who_only_recalls_is_never_asked_for_bytes_and_is_told_when_nobody_has_them(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U))
    world.core.peer_gone("frontend", "f0", world.now)
    world.carry_out()
    assert not world.wants("f1", 1)
    assert faults(world, "f1", 1) == ["NotFound"]
    assert world.idle()


def test_a_late_upload_is_late_for_who_promised_it_and_gone_for_who_recalled_it(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U))
    world.tick(UPLOAD_SECONDS)
    assert faults(world, "f0", 1) == ["DeadlineExceeded"]
    assert faults(world, "f1", 1) == ["NotFound"]


def test_an_upload_of_other_bytes_is_not_what_was_recalled(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U))
    world.put("f0", 1)
    world.fail(1, error("ProtocolError"))
    assert faults(world, "f0", 1) == ["ProtocolError"]
    assert faults(world, "f1", 1) == ["NotFound"]


def test_content_that_cannot_be_decoded_fails_for_who_recalled_it_too(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U))
    world.put("f0", 1)
    world.fail(1, error("DecodeError"))
    assert faults(world, "f1", 1) == ["DecodeError"]


def test_tensors_do_not_come_from_a_computation_of_the_plan(world):
    offer(world, "f0", 1, sent(CAT, U), need="plan")
    offer(world, "f1", 1, recalled(U))
    assert faults(world, "f1", 1) == ["NotFound"]


@pytest.mark.parametrize("first", ["recalled", "sent"])
def test_a_call_that_recalls_what_it_also_sends_is_asked_for_the_item_that_it_sends(world, first):
    compute(world, "f1", 1, sent(CAT, U))
    world.core.ring.clear()
    items = [recalled(U), sent(CAT)] if first == "recalled" else [sent(CAT), recalled(U)]
    offer(world, "f0", 1, *items)
    (want,) = world.wants("f0", 1)
    assert want.index == items.index(sent(CAT))
    world.put("f0", want.flight)
    world.fill(want.flight)
    assert world.outcomes("f0", 1) == ["computed", "computed"]
    assert world.answer("f0", 1)[items.index(recalled(U))].key == key(CAT)
    assert world.counted("mmprep_mm_cache_hits_total") == 1


def test_a_call_that_takes_over_an_upload_is_asked_for_the_item_that_it_sends(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, recalled(U), sent(CAT))
    world.core.peer_gone("frontend", "f0", world.now)
    world.carry_out()
    (want,) = world.wants("f1", 1)
    assert want.index == 1


def test_what_is_not_found_keeps_the_rest_of_its_request_from_nothing_but_the_answer(world):
    offer(world, "f0", 1, recalled(U), sent(CAT), recalled(U))
    assert world.answer("f0", 1) is None
    (want,) = world.wants("f0", 1)
    world.put("f0", want.flight)
    world.fill(want.flight)
    assert faults(world, "f0", 1) == ["NotFound", None, "NotFound"]
    assert world.idle()
    assert world.core.ring.in_ring(key(CAT))


def test_a_quarantined_item_is_refused_with_its_reason_also_where_it_is_recalled(world):
    offer(world, "f0", 1, sent(CAT, U))
    world.put("f0", 1)
    for _ in range(2):
        world.die(world.lane_of(1))
    offer(world, "f1", 1, recalled(U))
    assert faults(world, "f1", 1) == faults(world, "f0", 1) == ["MediaError"]


# --- what an alias stands for -------------------------------------------------------------------------------------------


def test_other_content_under_an_alias_makes_it_stand_for_that(world):
    compute(world, "f0", 1, sent(CAT, U))
    compute(world, "f1", 1, sent(DOG, U))
    offer(world, "f0", 2, recalled(U))
    assert world.answer("f0", 2)[0].key == key(DOG)
    compute(world, "f1", 2, sent(CAT, U))
    offer(world, "f0", 3, recalled(U))
    assert world.answer("f0", 3)[0].key == key(CAT)


def test_while_other_content_is_on_its_way_it_is_what_the_alias_stands_for(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(DOG, U))
    offer(world, "f1", 1, recalled(U))
    assert world.answer("f1", 1) is None
    (want,) = world.wants("f0", 2)
    world.put("f0", want.flight)
    world.fill(want.flight)
    assert world.answer("f1", 1)[0].key == key(DOG)


def test_after_content_that_failed_an_alias_does_not_stand_for_the_content_before(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(DOG, U))
    (want,) = world.wants("f0", 2)
    world.put("f0", want.flight)
    world.fail(want.flight, error("DecodeError"))
    offer(world, "f0", 3, recalled(U))
    assert faults(world, "f0", 3) == ["NotFound"]
    offer(world, "f0", 4, sent(CAT, U))
    offer(world, "f0", 5, recalled(U))
    assert world.outcomes("f0", 5) == ["hit"]


def test_of_two_requests_at_once_the_one_that_is_heard_of_last_counts_whichever_ends_first(world):
    offer(world, "f0", 1, sent(CAT, U))
    offer(world, "f1", 1, sent(DOG, U))
    for name, flight in (("f1", 2), ("f0", 1)):
        world.put(name, flight)
        world.fill(flight)
    offer(world, "f0", 2, recalled(U))
    assert world.answer("f0", 2)[0].key == key(DOG)


def test_of_two_contents_in_one_offer_the_last_counts_and_the_offer_recalls_what_was_before_it(world):
    compute(world, "f0", 1, sent(CAT, U))
    compute(world, "f0", 2, sent(DOG), sent(b"e" * 32))
    offer(world, "f0", 3, sent(DOG, U), recalled(U), sent(b"e" * 32, U))
    assert world.answer("f0", 3)[1].key == key(CAT)
    offer(world, "f0", 4, recalled(U))
    assert world.answer("f0", 4)[0].key == key(b"e" * 32)


def test_an_offer_that_finds_no_room_in_the_queue_moves_its_alias_all_the_same():
    world = World(max_items=1)
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(b"e" * 32))
    offer(world, "f0", 3, sent(DOG, U))
    assert world.fault("f0", 3).kind == "Busy"
    offer(world, "f0", 4, recalled(U))
    assert faults(world, "f0", 4) == ["NotFound"]


def test_an_offer_that_is_refused_for_its_backend_moves_nothing(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(DOG, U), lease="nobody")
    offer(world, "f0", 3, recalled(U))
    assert world.answer("f0", 3)[0].key == key(CAT)


def test_a_cleared_cache_has_forgotten_its_aliases(world):
    compute(world, "f0", 1, sent(CAT, U))
    offer(world, "f0", 2, sent(CAT))  # held, and so still there
    world.say("f0", messages.Clear(3))
    assert not len(world.core.aliases)
    compute(world, "f0", 4, sent(CAT))
    offer(world, "f0", 5, recalled(U))
    assert faults(world, "f0", 5) == ["NotFound"]


def test_aliases_have_a_bound(world):
    world = World(most_aliases=2)
    for call, alias in enumerate((U, V, b"x" * 32), 1):
        compute(world, "f0", call, sent(CAT, alias))
    offer(world, "f0", 9, recalled(U))
    assert faults(world, "f0", 9) == ["NotFound"]
    offer(world, "f0", 10, recalled(V))
    assert world.outcomes("f0", 10) == ["hit"]
