"""Admission and quarantine against models that keep plain lists."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.machines import at_length

from mmprep import errors
from mmprep_worker.scheduling.admission import (
    MAX_RETRY_AFTER,
    MIN_RETRY_AFTER,
    STRIKES,
    Admission,
    Quarantine,
)

MAX_ITEMS, MAX_BYTES, MAX_ITEMS_PER_CLIENT = 8, 50, 5
MAX_KEYS, QUARANTINE_SECONDS = 4, 10
SETTINGS = settings(max_examples=60, stateful_step_count=50, deadline=None, database=None)


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.admission = Admission(max_items=MAX_ITEMS, max_bytes=MAX_BYTES, max_items_per_client=MAX_ITEMS_PER_CLIENT)
        self.held: list[tuple[int, str, int]] = []
        self.last_id = 0
        self.now = 0.0

    @rule(client=st.sampled_from("abc"), sizes=st.lists(st.integers(0, 30), max_size=6))
    def request(self, client, sizes):
        mine = sum(holder == client for _, holder, _ in self.held)
        never = len(sizes) > MAX_ITEMS_PER_CLIENT or sum(sizes) > MAX_BYTES
        fits = (
            mine + len(sizes) <= MAX_ITEMS_PER_CLIENT
            and len(self.held) + len(sizes) <= MAX_ITEMS
            and sum(nbytes for _, _, nbytes in self.held) + sum(sizes) <= MAX_BYTES
        )
        if never and sizes:
            with pytest.raises(errors.TooLarge):
                self.admission.check(client, sizes)
        elif not fits and sizes:
            with pytest.raises(errors.Busy) as caught:
                self.admission.check(client, sizes)
            assert MIN_RETRY_AFTER <= caught.value.retry_after <= MAX_RETRY_AFTER
        else:
            self.admission.check(client, sizes)
            for nbytes in sizes:
                self.last_id += 1
                self.admission.add(self.last_id, client, nbytes, self.now)
                self.held.append((self.last_id, client, nbytes))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, MAX_ITEMS - 1))
    def release(self, pick):
        flight_id, _, _ = self.held.pop(pick % len(self.held))
        assert self.admission.release(flight_id, self.now)
        assert not self.admission.release(flight_id, self.now)

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def holds(self):
        self.admission.validate()
        assert len(self.admission) == len(self.held)
        assert self.admission.bytes == sum(nbytes for _, _, nbytes in self.held)

    def teardown(self):
        while self.held:
            self.release(0)
        self.holds()
        self.admission.check("a", [MAX_BYTES])


class QuarantineMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.quarantine = Quarantine(max_keys=MAX_KEYS, seconds=QUARANTINE_SECONDS)
        self.losses: list[tuple[bytes, int, int]] = []  # key, strikes, until; the oldest first
        self.now = 0

    @rule(key=st.sampled_from([b"1", b"2", b"3", b"4", b"5", b"6"]))
    def strike(self, key):
        self.forget_what_is_over()
        strikes = 1 + sum(strikes for struck, strikes, _ in self.losses if struck == key)
        self.losses = [loss for loss in self.losses if loss[0] != key]
        self.losses.append((key, strikes, self.now + QUARANTINE_SECONDS))
        self.losses = self.losses[-MAX_KEYS:]
        refusal = self.quarantine.strike(key, self.now)
        assert (refusal is not None) == (strikes >= STRIKES)

    @rule(key=st.sampled_from([b"1", b"2", b"3"]))
    def forgive(self, key):
        self.quarantine.forgive(key)
        self.losses = [loss for loss in self.losses if loss[0] != key]

    @rule(seconds=st.integers(0, 6))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def prune(self):
        self.quarantine.prune(self.now)
        self.forget_what_is_over()
        assert len(self.quarantine) == sum(strikes >= STRIKES for _, strikes, _ in self.losses)

    def forget_what_is_over(self):
        self.losses = [loss for loss in self.losses if loss[2] > self.now]

    @invariant()
    def holds(self):
        self.quarantine.validate()
        refused = {key for key, strikes, until in self.losses if strikes >= STRIKES and until > self.now}
        for number in range(1, 7):
            key = b"%d" % number
            refusal = self.quarantine.refusal(key, self.now)
            assert (refusal is not None) == (key in refused)
            assert refusal is None or not refusal.retryable


AdmissionMachine.TestCase.settings = SETTINGS
QuarantineMachine.TestCase.settings = SETTINGS
TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachineAtLength = at_length(AdmissionMachine)
TestQuarantineMachine = QuarantineMachine.TestCase
TestQuarantineMachineAtLength = at_length(QuarantineMachine)


def test_a_refused_caller_is_told_to_wait_about_as_long_as_the_work_in_excess_takes():
    admission = Admission(max_items=10, max_bytes=1000, max_items_per_client=10)
    now = 0.0
    for flight_id in range(100):
        admission.add(flight_id, "a", 1, now)
        now += 2.0
        assert admission.release(flight_id, now)
        now += 500.0  # idle time does not count
    for flight_id in range(100, 110):
        admission.add(flight_id, "a", 1, now)
    with pytest.raises(errors.Busy) as caught:
        admission.check("b", [1, 1, 1])
    assert caught.value.retry_after == pytest.approx(6.0, rel=0.01)
