"""The queue before the lanes: urgent first, fair between clients, heavy work apart, bounded."""

from __future__ import annotations

import itertools

import pytest

from mmprep import errors
from mmprep_worker.scheduling.queue import Entry, FairQueue

_ids = itertools.count(1)


@pytest.fixture
def queue():
    queue = FairQueue(max_items=1000, max_bytes=10_000)
    yield queue
    queue.validate()


def push(
    queue: FairQueue, client: str, *, cost: int = 100, priority: int = 0, nbytes: int = 1, heavy: bool = False
) -> int:
    flight_id = next(_ids)
    queue.push(Entry(flight_id, client, cost, priority, nbytes, heavy))
    return flight_id


def pop(queue: FairQueue, *, heavy_allowed: bool = True) -> Entry:
    entry = queue.pop(heavy_allowed=heavy_allowed)
    assert entry is not None
    return entry


def drain(queue: FairQueue, *, heavy_allowed: bool = True) -> list[Entry]:
    return list(iter(lambda: queue.pop(heavy_allowed=heavy_allowed), None))


def test_one_clients_entries_come_in_their_order(queue):
    pushed = [push(queue, "a", cost=cost, heavy=cost > 5) for cost in (9, 1, 5, 7)]
    assert [entry.flight_id for entry in drain(queue)] == pushed
    assert (len(queue), queue.bytes) == (0, 0)


def test_an_empty_queue_gives_nothing(queue):
    assert queue.pop(heavy_allowed=True) is None
    assert queue.pop(heavy_allowed=False) is None


@pytest.mark.parametrize("served_before", [0, 1, 7])
def test_a_flood_of_one_client_delays_another_by_at_most_one_item_of_its_own(queue, served_before):
    for _ in range(100):
        push(queue, "flood")
    for _ in range(served_before):
        pop(queue)
    mine = push(queue, "other")
    assert mine in {pop(queue).flight_id, pop(queue).flight_id}


def test_clients_take_turns_by_cost_not_by_number(queue):
    for _ in range(10):
        push(queue, "big", cost=300)
    for _ in range(30):
        push(queue, "small", cost=100)
    first = [pop(queue).client for _ in range(20)]
    assert 4 <= first.count("big") <= 6


def test_a_client_that_idled_gains_no_credit(queue):
    push(queue, "early")
    pop(queue)
    for _ in range(50):
        push(queue, "busy")
    for _ in range(20):
        pop(queue)
    for _ in range(50):
        push(queue, "early")
    assert [pop(queue).client for _ in range(10)].count("early") <= 6


def test_a_client_that_queues_one_item_at_a_time_gets_no_more_than_its_share(queue):
    for _ in range(50):
        push(queue, "flood")
    push(queue, "one by one")
    served = []
    for _ in range(20):
        entry = pop(queue)
        served.append(entry.client)
        if entry.client == "one by one":
            push(queue, "one by one")
    assert served.count("one by one") <= 11


def test_what_a_client_was_served_is_forgotten_once_nobody_waits(queue):
    push(queue, "a", cost=10_000)
    push(queue, "b")
    drain(queue)
    for _ in range(20):
        push(queue, "b")
    mine = push(queue, "a")
    assert mine in {pop(queue).flight_id, pop(queue).flight_id}


def test_heavy_work_that_waited_long_gives_no_credit_to_clients_that_come_after_it(queue):
    push(queue, "video", heavy=True)
    for _ in range(20):
        push(queue, "pictures")
    for _ in range(5):
        assert pop(queue, heavy_allowed=False).client == "pictures"
    assert pop(queue).heavy
    for _ in range(20):
        push(queue, "late")
    assert [pop(queue).client for _ in range(4)].count("late") <= 3


def test_an_entry_that_was_removed_is_not_charged(queue):
    for flight_id in [push(queue, "a", cost=10_000) for _ in range(10)]:
        assert queue.remove(flight_id).flight_id == flight_id
    push(queue, "b")
    push(queue, "b")
    mine = push(queue, "a")
    assert mine in {pop(queue).flight_id, pop(queue).flight_id}
    assert queue.remove(mine) is None


def test_the_more_urgent_priority_goes_first_whoever_waits(queue):
    low = push(queue, "a", priority=5)
    normal = push(queue, "b")
    urgent = push(queue, "a", priority=-5)
    assert [entry.flight_id for entry in drain(queue)] == [urgent, normal, low]


def test_an_entry_that_becomes_more_urgent_moves_ahead(queue):
    first = push(queue, "a", priority=1)
    second = push(queue, "a", priority=1, heavy=True)
    queue.reprioritise(second, 0)
    queue.reprioritise(12345678, 0)  # not queued: nothing
    entry = pop(queue)
    assert (entry.flight_id, entry.priority, entry.heavy) == (second, 0, True)
    assert pop(queue).flight_id == first


def test_heavy_work_is_never_given_to_a_light_lane(queue):
    heavy = push(queue, "a", heavy=True, priority=-9)
    assert queue.pop(heavy_allowed=False) is None
    assert pop(queue).flight_id == heavy


def test_heavy_work_does_not_block_light_work_of_its_own_client_or_another(queue):
    heavy = [push(queue, "a", heavy=True, cost=10_000) for _ in range(5)]
    own, other = push(queue, "a"), push(queue, "b")
    assert {entry.flight_id for entry in drain(queue, heavy_allowed=False)} == {own, other}
    assert [entry.flight_id for entry in drain(queue)] == heavy


def test_light_work_of_a_client_waits_its_turn_after_its_heavy_work_was_served(queue):
    push(queue, "video", heavy=True, cost=1000)
    push(queue, "video", cost=100)
    for _ in range(20):
        push(queue, "pictures", cost=100)
    assert pop(queue).heavy
    assert [pop(queue, heavy_allowed=False).client for _ in range(9)] == ["pictures"] * 9


@pytest.mark.parametrize("full", ["items", "bytes"])
def test_a_full_queue_refuses_with_retry_after_and_nothing_changes(full):
    queue = FairQueue(max_items=2 if full == "items" else 10, max_bytes=100 if full == "items" else 2)
    first, second = push(queue, "a"), push(queue, "b")
    with pytest.raises(errors.Busy) as caught:
        push(queue, "c", priority=-1)
    assert caught.value.retry_after > 0
    queue.validate()
    assert (len(queue), queue.bytes) == (2, 2)
    assert [entry.flight_id for entry in drain(queue)] == [first, second]
    push(queue, "c")


def test_ever_new_clients_and_cancelled_entries_leave_nothing_behind():
    queue = FairQueue(max_items=10, max_bytes=100)
    push(queue, "stays", priority=1, heavy=True)
    for number in range(2000):
        push(queue, f"client {number}")
        queue.remove(push(queue, f"client {number}", priority=1))
        push(queue, f"client {number}", priority=1)
        pop(queue, heavy_allowed=False)
        pop(queue, heavy_allowed=False)
    queue.validate()
    assert len(queue._any) + len(queue._light) < 1000
    assert len(queue._debts) <= 10
