"""Queues in the writer's core, one rule a test: what is pinned for jobs, leased at delivery, and told to whom."""

import msgspec
import pytest
from tests.unit.test_writer_core import LEASE_SECONDS, QUARTER, A, B, World

from mmprep.lease_id import mark_of, was_granted_to
from mmprep.wire import messages


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
    second, done = world.inbox.pop("engine")
    assert isinstance(second.message, messages.Delivery)
    assert done.message == messages.Done(2)
