"""A writer that takes over the ring of another one: what it serves, whom it hears, and when it grants again."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.test_writer_core import GEOMETRY, LEASE_SECONDS, META, QUARTER, A, B, C, World

from mmprep.layout import RECORD_SIZE, pack_free
from mmprep.lease_id import lease_incarnation, mark_of
from mmprep.wire import messages
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

READERS = (("backend", "engine"), ("frontend", "f0"), ("frontend", "f1"))
SILENT_AT = 2.0


@pytest.fixture
def former():
    """A world whose ring holds A, leased to ``engine``, and B, pinned for a call of ``f0``."""
    world = World()
    for slot in range(GEOMETRY.slots):
        start = GEOMETRY.record_offset(slot)
        world.memory[start : start + RECORD_SIZE] = pack_free(slot)
    world.lease = world.compute("f0", 1, A, lease="engine")[0]
    world.pinned = world.compute("f0", 2, B)[0]
    return world


def successor(former, *, hear=()):
    """Return a world with the ring of another one, where only the readers of ``hear`` have nothing to say."""
    ring = Ring(GEOMETRY, former.core.ring.incarnation + 1, Clock(GEOMETRY.slots), QUARTER)
    start = GEOMETRY.directory_offset
    ring.restore(former.memory[start : start + GEOMETRY.slots * RECORD_SIZE])
    world = World(ring=ring, awaited=READERS, silent_at=SILENT_AT)
    world.memory[:] = former.memory
    for name in hear:
        world.say(name, messages.Reassert(0, (), True))
    return world


def held(answer, kind="view"):
    return messages.Held(answer.lease, answer.slot, answer.generation, kind)


def test_hits_are_served_before_anybody_was_heard(former):
    world = successor(former)
    world.offer("f1", 1, A)
    answer = world.answer("f1", 1)[0]
    assert (answer.outcome, answer.generation, answer.meta) == ("hit", former.lease.generation, META)


def test_nothing_is_granted_before_every_reader_was_heard(former):
    world = successor(former)
    world.offer("f1", 1, C)
    flight = world.wants("f1", 1)[0].flight
    world.put("f1", flight)
    assert not world.tasks
    world.say("engine", messages.Reassert(1, (held(former.lease),), True))
    world.say("f0", messages.Repin(2, ((former.pinned.slot, former.pinned.generation),)))
    world.say("f0", messages.Reassert(0, (), True))
    assert not world.tasks
    assert not world.core.ring.settled
    world.say("f1", messages.Reassert(0, (), True))
    assert world.core.ring.settled
    world.fill(flight)
    assert world.answer("f1", 1)[0].outcome == "computed"


def test_leases_go_on_under_their_ids_and_new_ones_name_the_new_writer(former):
    world = successor(former, hear=("f0", "f1"))
    gone = messages.Held(bytes(16), former.lease.slot, former.lease.generation + 1, "copy")
    world.say("engine", messages.Reassert(7, (held(former.lease), gone), True))
    renewed = world.inbox["engine"][-1].message
    assert renewed == messages.Renewed(7, (gone.lease,), int(LEASE_SECONDS * 1000))
    lease = world.core.ring.leases.get(former.lease.lease)
    assert (lease.owner, lease.slot, lease.kind) == ("engine", former.lease.slot, "view")
    world.offer("f0", 3, B, lease="engine")
    new = world.answer("f0", 3)[0].lease
    assert (lease_incarnation(former.lease.lease), lease_incarnation(new)) == (1, 2)
    world.say("engine", messages.Release(0, (former.lease.lease, new)))
    assert world.core.ring.stats().leased == 0


def test_told_again_a_lease_is_the_same_and_takes_the_kind_that_its_holder_knows(former):
    world = successor(former, hear=("f0", "f1"))
    world.say("engine", messages.Reassert(1, (held(former.lease, "copy"),), True))
    world.say("engine", messages.Reassert(2, (held(former.lease, "view"),), True))
    assert world.inbox["engine"][-1].message.lost == ()
    assert world.core.ring.leases.get(former.lease.lease).kind == "view"
    assert len(world.core.ring.leases) == 1


def test_a_pin_goes_on_under_the_number_of_its_call_until_it_is_let_go(former):
    world = successor(former, hear=("engine", "f1"))
    places = ((former.pinned.slot, former.pinned.generation), (former.pinned.slot, former.pinned.generation + 1))
    world.say("f0", messages.Repin(2, places))
    world.say("f0", messages.Reassert(0, (), True))
    assert len(world.core.ring.holders) == 1
    world.say("f0", messages.Unpin(2))
    assert not world.core.ring.holders


def test_readers_that_are_gone_are_not_waited_for(former):
    world = successor(former, hear=("f0",))
    world.core.peer_gone("frontend", "f1", world.now)
    assert not world.core.ring.settled
    world.core.peer_gone("backend", "engine", world.now)
    world.carry_out()
    assert world.core.ring.settled
    assert world.core.ring.stats().leases == 0


def test_silent_readers_are_named_again_and_again_until_they_speak(former):
    world = successor(former, hear=("f0", "f1"))
    world.tick(SILENT_AT - 0.1)
    assert world.silent == []
    world.tick(0.2)
    assert world.silent == [(("backend", "engine"),)]
    assert world.core.wake_at > world.now
    world.tick(5.1)
    assert len(world.silent) == 2
    world.say("engine", messages.Reassert(0, (), True))
    world.tick(10.0)
    assert len(world.silent) == 2
    assert world.core.ring.settled


def test_what_cannot_wait_for_silent_readers_goes_beside_the_ring(former):
    world = successor(former, hear=("f0", "f1"))
    world.offer("f0", 1, C)
    flight = world.wants("f0", 1)[0].flight
    world.put("f0", flight)
    assert not world.tasks
    world.core.go_on_beside(world.now)
    world.carry_out()
    number = world.lane_of(flight)
    world.lane(number, messages.AskExtent(flight, 100), META)
    assert number not in world.granted, "nothing in the ring is granted"
    assert number in world.tasks or world.answer("f0", 1) is not None
    assert not world.core.ring.settled


def test_a_core_that_starts_anew_welcomes_the_peers_of_the_one_before(former):
    former.core.unreachable(b"f1", former.now)
    world = World()
    world.core.peers.clear()
    world.core.succeed(former.core, world.now)
    world.inbox.clear()
    world.core.take_actions()
    world.core.succeed(former.core, world.now)
    world.carry_out()
    assert sorted(world.inbox) == ["engine", "f0"]
    assert isinstance(world.inbox["f0"][0].message, messages.WriterWelcome)
    assert world.core.card == b"card"


def test_a_core_that_starts_anew_tags_leases_as_the_one_before(former):
    former.say("engine", messages.Retag(1, 4))
    world = World()
    world.core.peers.clear()
    world.core.succeed(former.core, world.now)
    world.carry_out()
    assert world.core.peers[b"engine"].mark == mark_of((1).to_bytes(4, "big"), 4)


def test_a_core_that_starts_anew_takes_jobs_with_keys_again_and_does_not_give_them_for_done(former):
    post = messages.Post(1, "job", "q", "producer", 0, 1, 9000, (), messages.Once(bytes(32), bytes(32)))
    former.say("engine", messages.Pull(1, ("q",), 0))
    former.core.message(b"f0", post, former.now, [b"content"])
    world = World()
    world.core.peers.clear()
    world.core.succeed(former.core, world.now)
    world.core.message(b"f0", msgspec.structs.replace(post, again=True), world.now, [b"content"])
    world.carry_out()
    assert [job.id for job in world.core.queues.jobs] == ["job"]
    world.core.message(b"f1", msgspec.structs.replace(post, job="other"), world.now, [b"content"])
    world.carry_out()
    assert world.got("f1", messages.Posted)[-1].message.job == "job"
