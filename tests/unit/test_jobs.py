"""Queues in the writer's core, one rule a test: what is pinned for jobs, leased at delivery, and told to whom."""

import msgspec
import pytest
from tests.unit.test_writer_core import LEASE_SECONDS, QUARTER, A, B, C, World

from mmprep.keys import item_key
from mmprep.lease_id import mark_of, was_granted_to
from mmprep.wire import messages
from mmprep_worker.scheduling.job import token


def posted(world, call, job, *keys, name="f0", queue="q", seconds=1000, **fields):
    """Render, post, and let go of the call's pins, as a frontend does; return the places."""
    places = ()
    if keys:
        world.offer(name, 10_000 + call, *keys)
        places = tuple((item.slot, item.generation) for item in world.answer(name, 10_000 + call))
    post = messages.Post(call, job, queue, "producer", 0, 1, seconds * 1000, places, **fields)
    world.core.message(name.encode(), post, world.now, [b"content of " + job.encode()])
    world.carry_out()
    if keys:
        world.say(name, messages.Unpin(10_000 + call))
    return places


def pull(world, name="engine", credit=4, queues=("q",)):
    world.say(name, messages.Pull(1, queues, credit))


def delivered(world, name="engine"):
    return [sent for sent in world.inbox.pop(name, []) if isinstance(sent.message, messages.Delivery)]


@pytest.fixture
def world():
    return World()


def test_a_job_holds_its_tensors_and_its_backend_gets_leases_at_delivery(world):
    world.cached(A)
    pull(world, credit=0)
    places = posted(world, 1, "job", A, A)
    assert world.core.ring.holders == {"job:job"}
    assert len(world.core.ring.leases) == 0
    pull(world)
    (sent,) = delivered(world)
    assert sent.frames == (b"content of job",)
    assert (sent.message.job, sent.message.attempt, len(sent.message.leases)) == ("job", 1, 2)
    for lease, (slot, generation) in zip(sent.message.leases, places, strict=True):
        mark = mark_of((1).to_bytes(4, "big"), 0)
        assert was_granted_to(mark, lease, slot=slot, generation=generation, kind="view")
    world.say("engine", messages.Ack(2, sent.message.token))
    assert world.core.ring.holders == frozenset()
    assert len(world.core.ring.leases) == 2, "they end by the backend's word"
    world.core.validate()


def test_a_frontend_is_told_of_ended_jobs_several_at_a_time_and_again_if_it_asks(world):
    pull(world)
    for number in range(3):
        posted(world, number + 1, f"job-{number}")
    for sent in delivered(world):
        world.say("engine", messages.Ack(5, sent.message.token))
    assert world.got("f0", messages.Finished) == []
    world.tick(0.1)
    (told,) = world.got("f0", messages.Finished)
    assert told.message.jobs == ("job-0", "job-1", "job-2")
    posted(world, 9, "job-1", again=True)
    assert world.got("f0", messages.Posted)[-1].message.job == "job-1"
    world.tick(0.1)
    assert world.got("f0", messages.Finished)[-1].message.jobs == ("job-1",)
    assert delivered(world) == []


def test_a_frontend_that_missed_the_end_of_a_job_with_a_key_is_told_again(world):
    same = messages.Once(bytes(32), bytes(32))
    pull(world)
    posted(world, 1, "job", once=same)
    (sent,) = delivered(world)
    world.say("engine", messages.Ack(5, sent.message.token))
    world.tick(0.1)
    assert world.got("f0", messages.Finished)[-1].message.jobs == ("job",)
    world.inbox.clear()
    posted(world, 2, "job", once=same, again=True)
    world.tick(0.1)
    assert world.got("f0", messages.Posted)[-1].message.job == "job"
    assert world.got("f0", messages.Finished)[-1].message.jobs == ("job",)
    assert delivered(world) == []


def test_a_backend_may_have_a_job_twice_when_the_writer_is_replaced_and_goes_on_with_the_later_delivery(world):
    former = [token(0, number) for number in (7, 8)]
    held = tuple(messages.HeldJob(made, "q", "job", attempt) for attempt, made in enumerate(former, 1))
    world.say("engine", messages.Holding(3, held))
    world.say("engine", messages.Ack(4, former[0]))
    world.say("engine", messages.Ack(5, former[1]))
    assert world.got("engine", messages.Failed)[-1].message.fault.kind == "StaleDelivery"
    assert world.got("engine", messages.Done)[-1].message.call == 5
    world.core.validate()


def test_nobody_posts_to_a_queue_that_nobody_pulls_from(world):
    posted(world, 1, "job", queue="nowhere")
    assert world.got("f0", messages.Failed)[-1].message.fault.kind == "NotFound"


def test_an_equal_request_is_posted_once_and_an_unequal_one_is_a_conflict(world):
    pull(world, credit=0)
    once = messages.Once(bytes(32), bytes(32))
    posted(world, 1, "job", once=once)
    posted(world, 2, "other", once=once)
    assert world.got("f0", messages.Posted)[-1].message == messages.Posted(2, "job")
    posted(world, 3, "third", once=messages.Once(bytes(32), b"x" * 32))
    assert world.got("f0", messages.Failed)[-1].message.fault.kind == "Conflict"
    assert len(world.core.queues) == 1


def test_a_job_of_an_earlier_writer_whose_tensors_are_gone_comes_with_an_error(world):
    pull(world)
    gone = messages.Post(1, "job", "q", "producer", 0, 1, 9000, ((0, 77),), None, again=True)
    world.core.message(b"f0", gone, world.now, [b"content"])
    world.carry_out()
    (sent,) = delivered(world)
    assert sent.message.leases == ()
    assert sent.message.fault.kind == "ServiceUnavailable"
    late = msgspec.structs.replace(gone, call=2, job="other", again=False)
    world.core.message(b"f0", late, world.now, [b"content"])
    world.carry_out()
    assert world.got("f0", messages.Failed)[-1].message.fault.kind == "ServiceUnavailable"


def test_a_backend_with_too_many_overdue_views_gets_no_job_and_another_does(world):
    world.cached(A)
    pull(world)
    world.core.ring.overdue_quota = QUARTER // 2
    posted(world, 1, "job-1", A)
    (first,) = delivered(world)
    world.say("engine", messages.Ack(2, first.message.token))
    world.tick(LEASE_SECONDS + 1)
    assert world.core.ring.leases.overdue_count == 1
    posted(world, 2, "job-2", A)
    assert delivered(world) == []
    world.hello("second", "backend", pid=2)
    pull(world, "second")
    (sent,) = delivered(world, "second")
    assert (sent.message.job, sent.message.attempt) == ("job-2", 2)


def test_what_a_lost_backend_had_is_delivered_elsewhere_and_its_pins_stay(world):
    world.cached(A)
    world.cached(B)
    world.hello("second", "backend", pid=2)
    pull(world)
    posted(world, 1, "job", A)
    (first,) = delivered(world)
    pull(world, "second")
    world.core.peer_gone("backend", "engine", world.now)
    world.carry_out()
    (again,) = delivered(world, "second")
    assert (again.message.job, again.message.attempt) == ("job", 2)
    assert world.core.ring.holders == {"job:job"}
    world.say("second", messages.Ack(3, first.message.token))
    assert world.got("second", messages.Failed)[-1].message.fault.kind == "StaleDelivery"
    world.say("second", messages.GiveBack(4, again.message.token, None))
    world.core.validate()


def test_a_post_that_is_accepted_ends_the_pins_of_its_offer_and_one_that_is_refused_does_not(world):
    world.cached(A)
    pull(world, credit=0)
    world.offer("f0", 5, A)
    (item,) = world.answer("f0", 5)
    post = messages.Post(6, "job", "nowhere", "p", 0, 1, 9000, ((item.slot, item.generation),), releases=5)
    world.core.message(b"f0", post, world.now, [b"content"])
    assert len(world.core.ring.holders) == 1
    assert "job:job" not in world.core.ring.holders
    for call in (7, 8):  # the second one is known, and ends nothing that goes on
        accepted = msgspec.structs.replace(post, call=call, queue="q")
        world.core.message(b"f0", accepted, world.now, [b"content"])
        assert world.core.ring.holders == {"job:job"}
    world.core.validate()


def test_a_backend_gets_its_next_job_before_it_hears_that_the_last_one_is_done(world):
    pull(world, credit=1)
    posted(world, 1, "job-1")
    posted(world, 2, "job-2")
    (first,) = delivered(world)
    world.say("engine", messages.Ack(2, first.message.token))
    (second,) = world.inbox.pop("engine")
    assert (second.message.job, second.message.done) == ("job-2", 2)
    world.say("engine", messages.GiveBack(3, second.message.token, "failed"))
    (again,) = world.inbox.pop("engine")
    assert (again.message.job, again.message.done) == ("job-2", 3)
    world.say("engine", messages.Ack(4, again.message.token))
    (done,) = world.inbox.pop("engine")
    assert done.message == messages.Done(4)


def test_a_backend_that_ends_a_job_is_answered_with_none_of_anothers(world):
    """It has credit for two; what it ends goes to another one that is free."""
    pull(world, credit=1)
    world.hello("second", "backend", pid=2)
    posted(world, 1, "job-1")
    (first,) = delivered(world)
    pull(world, "second", credit=1)
    world.say("engine", messages.GiveBack(2, first.message.token, "failed"))
    (other,) = delivered(world, "second")
    assert (other.message.job, other.message.done) == ("job-1", 0)
    assert world.inbox.pop("engine")[-1].message == messages.Done(2)


def test_jobs_that_are_done_are_told_several_at_a_time_and_those_whose_time_was_over_are_named(world):
    world.cached(A)
    pull(world, credit=2)
    for number in range(5):
        posted(world, number + 1, f"job-{number}", A)
    first, second = (sent.message for sent in delivered(world))
    world.say("engine", messages.Acks(2, (first.token, second.token)))
    third, fourth = (sent.message for sent in world.inbox.pop("engine"))
    assert [(sent.job, sent.done) for sent in (third, fourth)] == [("job-2", 2), ("job-3", 0)]
    world.say("engine", messages.GiveBack(3, third.token, None))
    (again,) = (sent.message for sent in world.inbox.pop("engine"))
    world.say("engine", messages.Acks(4, (third.token, fourth.token)))
    kept, last = sorted(
        (sent.message for sent in world.inbox.pop("engine")), key=lambda m: type(m).__name__, reverse=True
    )
    assert (kept, last.job) == (messages.Kept(4, (third.token,)), "job-4")
    world.say("engine", messages.Acks(5, (fourth.token, again.token, last.token)))
    assert [sent.message for sent in world.inbox.pop("engine")] == [messages.Done(5)], "what is said again does no harm"
    assert world.core.ring.holders == frozenset()
    world.core.validate()


# --- jobs that are made without an offer --------------------------------------------------------------------------------


def guessed(world, call, job, *keys, places=(), queue="q", **fields):
    """Post a job that was made of what is remembered of its items; return the answer.

    A key may be an item as it is told, too.
    """
    items = tuple(
        messages.Offered(key, "image", 1, 10, fields.pop("alias", None)) if isinstance(key, bytes) else key
        for key in keys
    )
    post = messages.Post(call, job, queue, "producer", 0, 1, 9000, tuple(places), items=items, **fields)
    world.core.message(b"f0", post, world.now, [b"content of " + job.encode()])
    world.carry_out()
    return world.inbox["f0"].pop().message


def place_of(world, key):
    entry = world.core.ring.in_ring(key)
    return entry.slot, entry.generation


def counted(world):
    return world.counted("mmprep_mm_cache_queries_total"), world.counted("mmprep_mm_cache_hits_total")


def test_a_job_whose_items_are_where_it_says_is_taken_at_once_and_its_items_count_as_found(world):
    world.cached(A, 1000)
    world.cached(B, 1000)
    pull(world)
    before = counted(world)
    places = [place_of(world, B), place_of(world, A), place_of(world, B)]
    assert guessed(world, 1, "job", A, B, B, places=places) == messages.Posted(1, "job")
    assert world.core.ring.holders == {"job:job"}
    assert counted(world) == (before[0] + 3, before[1] + 3)
    (sent,) = delivered(world)
    for lease, (slot, generation) in zip(sent.message.leases, places, strict=True):
        mark = mark_of((1).to_bytes(4, "big"), 0)
        assert was_granted_to(mark, lease, slot=slot, generation=generation, kind="view")


def test_a_job_whose_items_are_not_where_it_says_is_not_taken_and_leaves_nothing(world):
    world.cached(A)
    world.cached(B)
    pull(world)
    before, a, b = counted(world), place_of(world, A), place_of(world, B)
    later = (a[0], a[1] + 1)
    for keys, places in [
        ((A,), [later]),
        ((A,), [b]),
        ((A,), [a, b]),
        ((A, B), [a]),
        ((C,), [a]),
        ((A, C), [a, b]),
        ((A, C), []),
    ]:
        assert guessed(world, 1, "job", *keys, places=places) == messages.Unlike(1)
    world.say("f1", messages.Clear(9))
    assert guessed(world, 1, "job", A, places=[a]) == messages.Unlike(1)
    assert counted(world) == before
    assert not world.core.ring.holders
    assert not len(world.core.queues)


def test_a_job_that_needs_only_plans_is_taken_where_they_are_known(world):
    world.cached(A)
    pull(world, credit=0)
    assert guessed(world, 1, "of tensors", A) == messages.Posted(1, "of tensors")
    world.offer("f0", 2, B, need="plan")
    (want,) = world.wants("f0", 2)
    world.put("f0", want.flight)
    world.lane(world.lane_of(want.flight), messages.Planned(want.flight), b"a plan")
    world.tasks.pop(world.lane_of(want.flight))
    assert guessed(world, 3, "of a plan", A, B) == messages.Posted(3, "of a plan")
    assert not world.core.ring.holders
    assert guessed(world, 4, "unknown", C) == messages.Unlike(4)


def test_a_job_that_is_said_twice_is_one_also_where_its_items_have_gone_meanwhile(world):
    world.cached(A)
    pull(world, credit=0)
    place, before = place_of(world, A), counted(world)
    assert guessed(world, 1, "job", A, places=[place]) == messages.Posted(1, "job")
    world.say("f1", messages.Clear(9))
    assert guessed(world, 2, "job", A, places=[place]) == messages.Posted(2, "job")
    assert counted(world) == (before[0] + 1, before[1] + 1)
    assert len(world.core.queues) == 1


def test_a_job_that_is_refused_was_looked_for_and_holds_nothing(world):
    world.cached(A)
    pull(world, credit=0)
    before = counted(world)
    refused = guessed(world, 1, "job", A, places=[place_of(world, A)], queue="nowhere")
    assert refused.fault.kind == "NotFound"
    assert counted(world) == (before[0] + 1, before[1] + 1)
    assert not world.core.ring.holders


def test_a_name_that_comes_with_a_job_stands_for_its_content_whatever_becomes_of_the_job(world):
    name, variant = b"n" * 32, b"v" * 32
    for digest, places in ((b"x" * 32, []), (b"y" * 32, [(3, 3)])):
        guessed(world, 1, "job", item_key(variant, digest), places=places, alias=messages.Alias(name, digest))
        assert world.core.aliases.get(name) == digest


NAME, OTHER_NAME, VARIANT = b"n" * 32, b"o" * 32, b"v" * 32
CAT, DOG = (item_key(VARIANT, digest * 32) for digest in (b"c", b"d"))


def named(world, **digests):
    """Let names stand for contents, as offers of another frontend do."""
    for name, digest in digests.items():
        world.core.aliases.point({"name": NAME, "other": OTHER_NAME}[name], digest.encode() * 32)


def remembered(key, name=NAME):
    return messages.Remembered(name, VARIANT, "image", key)


def test_a_job_of_what_a_name_stands_for_is_taken_as_one_whose_medium_is_there(world):
    world.cached(CAT)
    pull(world)
    named(world, name="c")
    before = counted(world)
    assert guessed(world, 1, "job", remembered(CAT), places=[place_of(world, CAT)]) == messages.Posted(1, "job")
    assert guessed(world, 2, "of a plan", remembered(CAT)) == messages.Posted(2, "of a plan")
    assert counted(world) == (before[0] + 2, before[1] + 2)
    assert [len(sent.message.leases) for sent in delivered(world)] == [1, 0]


def test_a_job_is_not_taken_where_a_name_stands_for_other_content_by_now_or_for_none(world):
    """Names that are exchanged lead to the same two places, and to plans that are there."""
    for key in (CAT, DOG):
        world.cached(key, 1000)
    pull(world)
    both = [place_of(world, CAT), place_of(world, DOG)]
    before = counted(world)
    for names in ({}, {"name": "d", "other": "c"}, {"name": "c", "other": "c"}):
        named(world, **names)
        for places in (both, []):
            asked = remembered(CAT), remembered(DOG, OTHER_NAME)
            assert guessed(world, 1, "job", *asked, places=places) == messages.Unlike(1)
    assert guessed(world, 2, "job", DOG, remembered(CAT, OTHER_NAME), places=both) == messages.Posted(2, "job")
    world.say("f1", messages.Clear(9))
    assert guessed(world, 3, "after all", remembered(CAT)) == messages.Unlike(3)
    assert counted(world) == (before[0] + 2, before[1] + 2)


def test_a_job_that_is_said_twice_is_one_also_where_its_name_stands_for_something_else_meanwhile(world):
    world.cached(CAT)
    pull(world, credit=0)
    named(world, name="c")
    place = place_of(world, CAT)
    assert guessed(world, 1, "job", remembered(CAT), places=[place]) == messages.Posted(1, "job")
    named(world, name="d")
    assert guessed(world, 2, "job", remembered(CAT), places=[place]) == messages.Posted(2, "job")
    assert guessed(world, 3, "another", remembered(CAT), places=[place]) == messages.Unlike(3)


def test_a_name_that_a_job_brings_counts_after_what_the_job_remembers_of_it(world):
    world.cached(CAT)
    pull(world)
    named(world, name="c")
    place, dog = place_of(world, CAT), messages.Alias(NAME, b"d" * 32)
    assert guessed(world, 1, "job", remembered(CAT), CAT, places=[place], alias=dog) == messages.Posted(1, "job")
    assert world.core.aliases.get(NAME) == b"d" * 32
