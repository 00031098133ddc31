"""Lease ids: what a reader can see in one by itself."""

import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmprep.layout import MAX_COUNTER, MAX_INCARNATION, generation
from mmprep.lease_id import RANDOM_SIZE, lease_id, lease_incarnation, mark_of, was_granted_to

MARKS = st.builds(mark_of, st.binary(max_size=16), st.integers(0, 2**48))
GRANTED = st.fixed_dictionaries(
    {
        "slot": st.integers(0, 2**48),
        "generation": st.integers(0, 2**63 - 1),
        "kind": st.sampled_from(["copy", "view"]),
    }
)
LARGEST = {"slot": 2**48, "generation": generation(MAX_INCARNATION, MAX_COUNTER), "kind": "view"}
INCARNATIONS = st.integers(1, MAX_INCARNATION)
RANDOM = st.binary(min_size=RANDOM_SIZE, max_size=RANDOM_SIZE)


@given(INCARNATIONS, RANDOM, MARKS, GRANTED)
@example(MAX_INCARNATION, bytes(8), mark_of(b"", 2**48), LARGEST)
def test_an_id_says_which_writer_granted_it_and_to_its_reader_that_it_is_its_own(incarnation, random, mark, granted):
    lease = lease_id(incarnation, random, mark=mark, **granted)
    assert len(lease) == 16
    assert lease_incarnation(lease) == incarnation
    assert lease.endswith(random)
    assert was_granted_to(mark, lease, **granted)


def test_the_tag_is_the_keyed_hash_of_all_that_was_granted():
    lease = lease_id(7, b"-random-", mark=mark_of(b"instance", 2), slot=3, generation=0x1234, kind="view")
    facts = b"\0\0\7" + b"-random-" + bytes(7) + b"\3" + bytes(6) + b"\x12\x34" + b"view"
    tag = hashlib.blake2b(facts, digest_size=5, key=b"instance" + bytes(7) + b"\2").digest()
    assert lease == b"\0\0\7" + tag + b"-random-"


OTHER = {
    "process before under the same id": {"mark": mark_of(b"instance before", 0)},
    "turn": {"mark": mark_of(b"instance", 1)},
    "slot": {"slot": 4},
    "generation": {"generation": 6},
    "kind": {"kind": "copy"},
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_a_lease_of_another_is_nobody_elses(other):
    granted = {"mark": mark_of(b"instance", 0), "slot": 3, "generation": 5, "kind": "view"}
    lease = lease_id(1, bytes(8), **granted)
    assert was_granted_to(lease=lease, **granted)
    assert not was_granted_to(lease=lease, **granted | other)


@given(st.integers(0, 127))
def test_a_lease_with_one_wrong_bit_is_nobodys(bit):
    granted = {"mark": mark_of(b"instance", 0), "slot": 3, "generation": 5, "kind": "view"}
    lease = int.from_bytes(lease_id(1, bytes(range(8)), **granted), "big")
    assert not was_granted_to(lease=(lease ^ 1 << bit).to_bytes(16, "big"), **granted)


def test_marks_of_instances_that_continue_each_other_differ():
    assert len({mark_of(instance, turn) for instance in (b"", b"a", b"a" + bytes(8)) for turn in (0, 1, 2**40)}) == 9
