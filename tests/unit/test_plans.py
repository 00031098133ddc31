"""The store of plans: bounded by bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep_worker.writer.plans import PlanStore

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
OPERATIONS = st.lists(
    st.tuples(st.just("put"), KEYS, st.binary(max_size=400)) | st.tuples(st.just("get"), KEYS, st.none())
)


@given(OPERATIONS)
def test_it_holds_the_latest_used_that_fit(operations):
    plans, model = PlanStore(1000), OrderedDict()
    for what, key, meta in operations:
        if what == "put":
            plans.put(key, meta)
            model.pop(key, None)
            model[key] = meta
            while sum(len(kept) + PlanStore.OVERHEAD for kept in model.values()) > 1000:
                model.popitem(last=False)
        else:
            assert plans.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        plans.validate()
        assert len(plans) == len(model)
    assert all(plans.get(key) == meta for key, meta in model.items())


def test_metadata_above_the_bound_are_not_kept_and_cost_no_other_plan():
    plans = PlanStore(1000)
    plans.put(b"a", b"small")
    plans.put(b"b", bytes(1000))
    plans.validate()
    assert plans.get(b"b") is None
    assert plans.get(b"a") == b"small"


def test_metadata_above_the_bound_replace_what_was_kept_for_the_key():
    plans = PlanStore(1000)
    plans.put(b"a", b"old")
    plans.put(b"a", bytes(1000))
    assert plans.get(b"a") is None
    plans.validate()


@pytest.mark.parametrize("before", [0, 3])
def test_nothing_is_left_when_it_was_cleared(before):
    plans = PlanStore(1000)
    for number in range(before):
        plans.put(b"%d" % number, b"meta")
    plans.clear()
    assert len(plans) == 0
    plans.validate()
