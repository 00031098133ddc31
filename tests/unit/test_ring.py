"""The ring's rules, one by one, and those of its parts."""

import pytest

from mmprep import errors
from mmprep.layout import RECORD_SIZE, Geometry, Record, State, generation, pack_free, pack_record, unpack_record
from mmprep_worker.ring.leases import Leases
from mmprep_worker.ring.policy import Clock
from mmprep_worker.ring.ring import Ring

CAPACITY = 4096
QUARTER = CAPACITY // 4


def key(n):
    return n.to_bytes(32, "big")


def lease_id(n):
    return n.to_bytes(16, "big")


def new_ring(slots=16, incarnation=1, **options):
    return Ring(Geometry.plan(CAPACITY, slots), incarnation, Clock(slots), QUARTER, **options)


def store(ring, n, nbytes=QUARTER):
    """Grant and publish key ``n``."""
    grant = ring.grant(key(n), 0, nbytes)
    return ring.publish(grant.slot, grant.generation)


def lease(ring, n, entry, *, owner="engine", kind="copy", now=0.0, seconds=10.0):
    return ring.deliver(lease_id(n), owner, entry.slot, entry.generation, kind, now=now, seconds=seconds)


def found(ring, *numbers):
    return [n for n in numbers if ring.lookup(key(n)) is not None]


def image_after(ring, *, slots=16, image=None):
    """Return the directory after the ring's writes so far."""
    image = image or bytearray(b"".join(pack_free(slot) for slot in range(slots)))
    for slot, record in ring.take_writes():
        image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE] = record
    return image


def test_an_item_is_found_only_when_it_is_published():
    ring = new_ring()
    grant = ring.grant(key(1), 70, 100)
    assert (grant.tensor_offset - grant.offset, grant.length) == (128, 228)
    assert ring.lookup(key(1)) is None
    entry = ring.publish(grant.slot, grant.generation)
    assert ring.lookup(key(1)) is entry
    assert (entry.slot, entry.key, entry.offset) == (grant.slot, key(1), grant.offset)
    assert (entry.meta_len, entry.length, entry.generation) == (70, 228, grant.generation)


def test_a_key_in_the_ring_is_not_granted_again():
    ring = new_ring()
    grant = ring.grant(key(1), 0, 64)
    with pytest.raises(ValueError, match="already"):
        ring.grant(key(1), 0, 64)
    ring.publish(grant.slot, grant.generation)
    with pytest.raises(ValueError, match="already"):
        ring.grant(key(1), 0, 64)


@pytest.mark.parametrize(("wrong", "meta_len", "tensor_len"), [(b"short", 1, 1), (key(1), -1, 9), (key(1), 0, 0)])
def test_a_nonsensical_grant_is_refused(wrong, meta_len, tensor_len):
    with pytest.raises(ValueError):
        new_ring().grant(wrong, meta_len, tensor_len)


def test_one_object_never_evicts_the_world():
    ring = new_ring()
    for n in range(4):
        store(ring, n)
    with pytest.raises(errors.TooLarge, match="--max-object-size"):
        ring.grant(key(9), 1, QUARTER)
    assert found(ring, 0, 1, 2, 3) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a quarter of the ring"):
        Ring(Geometry.plan(CAPACITY, 4), 1, Clock(4), QUARTER + 1)


def test_used_entries_outlive_a_grant_and_unused_ones_go():
    ring = new_ring()
    for n in range(4):
        store(ring, n)
    ring.lookup(key(0))
    store(ring, 4)
    assert found(ring, 0, 1, 2, 3, 4) == [0, 2, 3, 4]
    assert ring.stats().evictions == 1


def test_a_new_entry_does_not_inherit_the_use_of_the_one_before_it():
    ring = new_ring()
    for n in range(4):
        store(ring, n)
    ring.lookup(key(0))
    ring.remove(key(0))
    store(ring, 4)
    ring.lookup(key(1))
    store(ring, 5)
    store(ring, 6)
    store(ring, 7)
    assert found(ring, 1, 4) == [1]


@pytest.mark.parametrize("hold", ["pin", "lease", "grant"])
def test_what_is_held_is_never_granted_again_and_a_full_ring_says_so(hold):
    ring = new_ring()
    for n in range(4):
        if hold == "grant":
            ring.grant(key(n), 0, QUARTER)
            continue
        entry = store(ring, n)
        if hold == "pin":
            ring.pin("call", entry.slot)
        else:
            lease(ring, n, entry)
    ring.take_writes()
    for _ in range(2):
        assert ring.grant(key(9), 0, 64) is None
    assert ring.take_writes() == ()
    assert ring.stats().slots_used == 4
    ring.validate()


def test_a_full_ring_grants_again_when_a_pin_ends():
    ring = new_ring()
    for n in range(4):
        ring.pin(f"call-{n}", store(ring, n).slot)
    assert ring.grant(key(9), 0, QUARTER) is None
    assert ring.unpin("call-2") == 1
    assert ring.unpin("call-2") == 0
    assert ring.grant(key(9), 0, QUARTER).evicted == 1
    assert found(ring, 0, 1, 2, 3) == [0, 1, 3]


def test_fragments_that_do_not_fit_evict_nothing_until_something_is_let_go():
    ring = new_ring(slots=64)
    for n in range(64):
        entry = store(ring, n, 64)
        if n % 2:
            ring.pin(f"call-{n}", entry.slot)
    assert ring.grant(key(99), 0, 128) is None
    assert ring.grant(key(99), 0, 128) is None
    assert len(found(ring, *range(64))) == 64
    ring.unpin("call-7")
    assert ring.grant(key(99), 0, 128).evicted == 2


def test_a_refused_grant_does_not_stand_in_the_way_of_a_smaller_one():
    ring = new_ring(slots=64)
    for n in range(32):
        entry = store(ring, n, 128)
        if n % 2:
            ring.pin(f"call-{n}", entry.slot)
    assert ring.grant(key(98), 0, 192) is None
    assert ring.grant(key(99), 0, 128).evicted == 1


def test_a_holder_may_pin_an_entry_twice_and_ends_all_at_once():
    ring = new_ring()
    entry = store(ring, 1)
    ring.pin("call", entry.slot)
    ring.pin("call", entry.slot)
    ring.pin("job", entry.slot)
    assert ring.unpin("call") == 2
    assert not entry.idle
    assert ring.unpin("job") == 1
    assert entry.idle


def test_only_published_entries_are_pinned():
    ring = new_ring()
    grant = ring.grant(key(1), 0, 64)
    for slot in (grant.slot, 7, -1, 99):
        with pytest.raises(errors.StaleAddress):
            ring.pin("call", slot)


def test_a_full_directory_evicts_a_slot_though_the_arena_has_space():
    ring = new_ring(slots=2)
    store(ring, 0, 64)
    store(ring, 1, 64)
    ring.lookup(key(0))
    grant = ring.grant(key(2), 0, 64)
    assert grant.evicted == 1
    assert found(ring, 0, 1) == [0]
    assert [record for _, record in ring.take_writes()][-2] == pack_free(grant.slot)
    assert ring.grant(key(3), 0, 64).evicted == 1
    assert ring.grant(key(4), 0, 64) is None
    ring.validate()


def test_an_aborted_grant_frees_its_extent_slot_and_key():
    ring = new_ring()
    grant = ring.grant(key(1), 0, QUARTER)
    ring.abort(grant.slot, grant.generation)
    assert ring.stats().free == CAPACITY
    assert ring.stats().slots_used == 0
    again = ring.grant(key(1), 0, QUARTER)
    assert again.generation > grant.generation
    for end in (ring.publish, ring.abort):
        with pytest.raises(errors.StaleAddress):
            end(grant.slot, grant.generation)
    ring.publish(again.slot, again.generation)


def test_victims_are_invalidated_before_the_grant_is_recorded():
    ring = new_ring()
    for n in range(8):
        store(ring, n, 512)
    ring.take_writes()
    grant = ring.grant(key(9), 0, QUARTER)
    writes = ring.take_writes()
    assert [record for _, record in writes[:2]] == [pack_free(0), pack_free(1)]
    assert writes[2][0] == grant.slot
    assert unpack_record(writes[2][1], grant.slot, ring.geometry).state is State.GRANTED
    ring.publish(grant.slot, grant.generation)
    ((slot, record),) = ring.take_writes()
    assert unpack_record(record, slot, ring.geometry).state is State.READY


def test_a_cleared_entry_that_is_leased_stays_until_it_is_released():
    ring = new_ring()
    held, idle = store(ring, 1), store(ring, 2)
    lease(ring, 1, held)
    lease(ring, 2, held)
    ring.take_writes()
    assert ring.clear() == 2
    assert found(ring, 1, 2) == []
    states = {slot: unpack_record(record, slot, ring.geometry) for slot, record in ring.take_writes()}
    assert states[idle.slot] is None
    assert states[held.slot].state is State.RETIRED
    assert store(ring, 1, 64) is not held
    ring.release("engine", [lease_id(1)])
    assert ring.stats().leased == QUARTER
    ring.release("engine", [lease_id(2)])
    assert ring.stats().leased == 0
    assert ring.stats().entries == 1
    ring.validate()


def test_entries_are_told_by_slot_in_pages_and_those_beside_the_ring_come_last():
    ring = new_ring(spill_bytes=1 << 20)
    entries = [store(ring, n, 64) for n in range(5)]
    ring.grant(key(9), 0, 64)
    spill = ring.publish_spill(ring.grant_spill(key(7), b"meta", 100, bytes(16)))
    assert spill.slot >= 16
    told, start, pages = [], 0, 0
    while pages == 0 or start:
        page, start = ring.in_slots(start, 3)
        assert len(page) <= 3
        told += page
        pages += 1
    assert pages == -(-(16 + 256) // 3)
    assert [entry.slot for entry in told] == sorted(entry.slot for entry in told)
    assert told[:5] == entries
    assert told[5].state is State.GRANTED
    assert told[6:] == [spill]
    assert ring.in_slots(10**15, 3) == ([], 0)


def test_removing_a_grant_or_nothing_does_nothing():
    ring = new_ring()
    grant = ring.grant(key(1), 0, 64)
    assert not ring.remove(key(1))
    assert not ring.remove(key(2))
    assert ring.clear() == 0
    assert ring.publish(grant.slot, grant.generation) is ring.lookup(key(1))


def test_a_lease_needs_the_entrys_generation():
    ring = new_ring()
    entry = store(ring, 1)
    for slot, number in [(entry.slot, entry.generation + 1), (entry.slot + 1, entry.generation), (99, 1)]:
        with pytest.raises(errors.StaleAddress):
            ring.deliver(lease_id(1), "engine", slot, number, "copy", now=0, seconds=1)
    assert ring.stats().leases == 0


def test_lease_operations_of_others_change_nothing():
    ring = new_ring()
    entry = store(ring, 1)
    lease(ring, 1, entry, seconds=10)
    assert ring.renew("stranger", [lease_id(1), lease_id(2)], 5, 100) == {lease_id(1): False, lease_id(2): False}
    assert ring.release("stranger", [lease_id(1)]) == [lease_id(1)]
    assert not ring.upgrade("stranger", lease_id(1), "view")
    assert ring.owner_gone("stranger") == 0
    with pytest.raises(ValueError, match="taken"):
        lease(ring, 1, entry, owner="stranger")
    assert ring.leases.get(lease_id(1)).kind == "copy"
    assert ring.leases.next_deadline() == 10
    assert ring.stats().leased == QUARTER


def test_a_repeated_delivery_or_release_does_no_harm():
    ring = new_ring()
    entry = store(ring, 1)
    lease(ring, 1, entry, now=0)
    lease(ring, 1, entry, now=5)
    assert ring.stats().leases == 1
    assert ring.leases.next_deadline() == 15
    assert ring.release("engine", [lease_id(1)]) == []
    assert ring.release("engine", [lease_id(1)]) == [lease_id(1)]
    assert entry.idle


def test_an_overdue_copy_is_revoked_and_an_overdue_view_never():
    ring = new_ring()
    copied, viewed = store(ring, 1), store(ring, 2)
    lease(ring, 1, copied, kind="copy")
    lease(ring, 2, viewed, kind="view")
    assert ring.tick(9.9) == []
    assert [revoked.lease_id for revoked in ring.tick(10)] == [lease_id(1)]
    assert ring.tick(1e9) == []
    assert copied.idle
    assert not viewed.idle
    assert (ring.stats().overdue, ring.stats().revoked, ring.stats().leases) == (1, 1, 1)
    assert ring.leases.overdue("engine") == (1, QUARTER)
    assert ring.renew("engine", [lease_id(2)], 1e9, 10) == {lease_id(2): True}
    assert ring.leases.overdue("engine") == (0, 0)
    ring.tick(2e9)
    assert ring.upgrade("engine", lease_id(2), "copy")
    assert len(ring.tick(2e9)) == 1
    assert viewed.idle


def test_an_owner_with_too_many_overdue_views_gets_no_more():
    ring = new_ring(overdue_quota=QUARTER)
    entries = [store(ring, n) for n in range(3)]
    lease(ring, 9, entries[2], kind="copy", seconds=1000)
    for n in range(2):
        lease(ring, n, entries[n], kind="view")
    ring.tick(10)
    with pytest.raises(errors.Busy, match="overdue views"):
        lease(ring, 5, entries[2])
    with pytest.raises(errors.Busy):
        ring.upgrade("engine", lease_id(9), "view")
    lease(ring, 5, entries[2], owner="other")
    lease(ring, 0, entries[0], kind="view", now=10)
    lease(ring, 6, entries[2])


def test_a_backend_that_is_gone_leaves_nothing():
    ring = new_ring()
    entry = store(ring, 1)
    lease(ring, 1, entry, kind="view")
    lease(ring, 2, entry, kind="copy")
    lease(ring, 3, entry, owner="other")
    ring.tick(10)
    assert ring.owner_gone("engine") == 1
    assert ring.leases.overdue("engine") == (0, 0)
    assert ring.owner_gone("engine") == 0
    assert ring.stats().leases == 0
    assert entry.idle


def test_deadlines_of_ended_leases_do_not_pile_up():
    leases = Leases()
    for n in range(1000):
        leases.deliver(lease_id(n), "engine", 0, 64, "copy", now=0.0, seconds=10)
        leases.renew("engine", [lease_id(n)], 1.0, 10)
        leases.release("engine", [lease_id(n)])
        leases.validate()
    assert leases.next_deadline() is None


def test_sweeping_out_ended_leases_during_a_tick_loses_none():
    leases = Leases()
    for n in range(250):
        leases.deliver(lease_id(n), "engine", 0, 64, "copy", now=0.0, seconds=10 if n < 100 else 50)
    leases.renew("engine", [lease_id(n) for n in range(50, 100)], 0.0, 100)
    leases.release("engine", [lease_id(n) for n in range(100, 250)])
    assert len(leases.tick(10)) == 50
    leases.validate()
    assert len(leases.tick(100)) == 50


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_lease_lasts_a_positive_finite_time(seconds):
    leases = Leases()
    with pytest.raises(ValueError, match="finite"):
        leases.deliver(lease_id(1), "engine", 0, 64, "copy", now=0.0, seconds=seconds)
    with pytest.raises(ValueError, match="finite"):
        leases.renew("engine", [], 0.0, seconds)


def test_a_malformed_lease_is_refused():
    leases = Leases()
    with pytest.raises(ValueError, match="16 bytes"):
        leases.deliver(b"short", "engine", 0, 64, "copy", now=0.0, seconds=1)
    with pytest.raises(ValueError, match="copy or a view"):
        leases.deliver(lease_id(1), "engine", 0, 64, "peek", now=0.0, seconds=1)
    with pytest.raises(ValueError, match="copy or a view"):
        leases.upgrade("engine", lease_id(1), "peek")
    assert len(leases) == 0


def test_after_a_restart_published_entries_are_found_at_once_and_grants_wait():
    old = new_ring()
    kept, leased = store(old, 1, 512), store(old, 2, 512)
    lease(old, 1, leased, kind="view")
    old.remove(key(2))
    unfinished = old.grant(key(3), 0, 512)
    image = image_after(old)
    ring = new_ring(incarnation=2)
    assert ring.restore(image) == 2
    assert ring.take_writes() == ((unfinished.slot, pack_free(unfinished.slot)),)
    assert found(ring, 1, 2, 3) == [1]
    assert ring.lookup(key(1)).generation == kept.generation
    assert ring.grant(key(4), 0, 64) is None
    lease(ring, 1, leased, kind="view")
    ring.settle()
    assert ring.grant(key(4), 0, 64).generation > unfinished.generation
    ring.validate()
    assert ring.stats().leased == 512
    ring.release("engine", [lease_id(1)])
    assert ring.stats().entries == 1


def test_what_was_removed_and_is_not_re_asserted_goes_when_the_ring_settles():
    old = new_ring()
    entry = store(old, 1)
    old.pin("call", entry.slot)
    old.remove(key(1))
    ring = new_ring(incarnation=2)
    ring.restore(image_after(old))
    assert ring.stats().entries == 1
    ring.settle()
    assert ring.stats().free == CAPACITY


def test_a_release_before_all_leases_are_known_does_not_free_what_another_may_hold():
    old = new_ring()
    entry = store(old, 1)
    lease(old, 1, entry, kind="view")
    old.remove(key(1))
    ring = new_ring(incarnation=2)
    ring.restore(image_after(old))
    lease(ring, 1, entry, owner="fast", kind="view")
    ring.release("fast", [lease_id(1)])
    lease(ring, 2, entry, owner="slow", kind="view")
    ring.settle()
    assert ring.stats().leased == QUARTER


def test_what_is_removed_before_all_leases_are_known_can_still_be_re_asserted():
    old = new_ring()
    entry = store(old, 1)
    lease(old, 1, entry, kind="view")
    ring = new_ring(incarnation=2)
    ring.restore(image_after(old))
    assert ring.clear() == 1
    lease(ring, 1, entry, kind="view")
    ring.settle()
    assert ring.stats().leased == QUARTER
    ring.validate()


def test_a_restart_drops_damaged_overlapping_and_future_records():
    ring = new_ring(incarnation=2)
    base = ring.geometry.arena_offset

    def record(slot, offset, length, *, state=State.READY, number=None, name=None):
        number = generation(1, slot + 1) if number is None else number
        return pack_record(Record(state, slot, number, base + offset, 0, length, key(slot if name is None else name)))

    records = [
        record(0, 0, 64),
        record(1, 64, 512),
        record(2, 448, 64),  # within the one before
        record(3, 640, 128, state=State.GRANTED),
        record(4, 704, 64),  # a lane may have written into it
        record(5, 1024, 64, number=generation(2, 0)),
        record(6, 1088, 64, name=77),
        record(7, 1152, 64, name=77),
        bytes(RECORD_SIZE),
        record(0, 2048, 64),  # another slot's
        record(10, 512, 64),  # within the long one, behind the short one
    ]
    records += [pack_free(slot) for slot in range(len(records), 16)]
    assert ring.restore(b"".join(records)) == 2
    assert [slot for slot, _ in ring.take_writes()] == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert ring.lookup(key(0)).slot == 0
    assert ring.lookup(key(77)).slot == 7
    ring.validate()


@pytest.mark.parametrize("keys", [(7, 7), (7, 8)])
@pytest.mark.parametrize("other", [State.GRANTED, State.READY, State.RETIRED])
def test_a_restart_drops_records_of_one_generation(keys, other):
    ring = new_ring(incarnation=2)
    base = ring.geometry.arena_offset
    records = [
        pack_record(Record(State.READY, 0, generation(1, 5), base, 0, 64, key(keys[0]))),
        pack_record(Record(other, 1, generation(1, 5), base + 64, 0, 64, key(keys[1]))),
        pack_record(Record(State.READY, 2, generation(1, 4), base + 128, 0, 64, key(9))),
    ]
    records += [pack_free(slot) for slot in range(len(records), 16)]
    assert ring.restore(b"".join(records)) == 1, "a generation is never used twice, so both are damaged"
    ring.validate()
    assert found(ring, 7, 8, 9) == [9]


def test_after_a_restart_the_oldest_entry_goes_first():
    """The hand goes on where the former writer's stood, so what was granted last is evicted last."""
    ring = new_ring()
    image = bytearray(b"".join(pack_free(slot) for slot in range(ring.geometry.slots)))
    for number in range(6):  # the fifth and sixth take the place of the first and second
        granted = ring.grant(bytes([number]) * 32, 0, QUARTER)
        ring.publish(granted.slot, granted.generation)
    for slot, record in ring.take_writes():
        image[slot * RECORD_SIZE : (slot + 1) * RECORD_SIZE] = record
    again = new_ring(incarnation=2)
    assert again.restore(image) == 4
    again.settle()
    assert again.grant(bytes([6]) * 32, 0, QUARTER) is not None
    assert [number for number in range(2, 6) if again.lookup(bytes([number]) * 32) is None] == [2]


def test_a_directory_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16 slots has 2048 bytes"):
        new_ring().restore(bytes(100))


def test_the_statistics_account_for_every_byte():
    ring = new_ring()
    store(ring, 1, 100)
    lease(ring, 1, store(ring, 2, 200))
    ring.grant(key(3), 10, 300)
    stats = ring.stats()
    assert (stats.ready, stats.leased, stats.filling) == (128, 256, 384)
    assert stats.free == CAPACITY - 768
    assert (stats.entries, stats.slots_used, stats.slots, stats.leases) == (2, 3, 16, 1)


def test_the_clock_spares_a_used_slot_once_and_forgets_a_freed_one():
    clock = Clock(2)
    assert not clock.spare(0)
    clock.touched(0)
    assert clock.spare(0)
    assert not clock.spare(0)
    clock.touched(1)
    clock.forgotten(1)
    assert not clock.spare(1)
