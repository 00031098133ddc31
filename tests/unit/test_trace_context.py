"""``traceparent`` and ``tracestate``, beside the SDK's own propagator."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mmprep_frontend.tracing.context import Parent, read_parent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
RIGHT = f"00-{TRACE}-{SPAN}-01"


def theirs(parent):
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": parent})).get_span_context()
    if not context.is_valid:
        return None
    return Parent(context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big"), context.trace_flags.sampled)


@pytest.mark.parametrize("flags", ["00", "01", "02", "03", "ff"])
def test_the_first_bit_of_the_flags_says_whether_a_trace_is_sampled(flags):
    parent = read_parent([f"00-{TRACE}-{SPAN}-{flags}"])
    assert parent == Parent(bytes.fromhex(TRACE), bytes.fromhex(SPAN), bool(int(flags, 16) % 2))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "x",
        RIGHT[:-1],
        RIGHT + "-",
        RIGHT + "-more",
        RIGHT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-0g",
        f"00_{TRACE}_{SPAN}_01",
        RIGHT + "\n",
    ],
)
def test_a_malformed_parent_is_none(wrong):
    assert read_parent([wrong]) is None


def test_several_parents_are_none_and_a_later_version_is_read_as_far_as_it_is_known():
    assert read_parent([RIGHT, RIGHT]) is None
    assert read_parent([]) is None
    assert read_parent([f"cc-{TRACE}-{SPAN}-01-what-the-future-brings"]) == read_parent([RIGHT])
    assert read_parent([f"cc-{TRACE}-{SPAN}-01.what"]) is None


hexdigits = st.text("0123456789abcdef", min_size=0, max_size=34)


@given(
    st.tuples(st.sampled_from(["00", "01", "cc", "ff", "0"]), hexdigits, hexdigits, st.sampled_from(["00", "01", "1"]))
)
@example(("00", TRACE, SPAN, "01"))
@example(("cc", TRACE, SPAN, "00"))
def test_what_is_read_is_what_the_sdk_reads(parts):
    parent = "-".join(parts)
    assert read_parent([parent]) == theirs(parent)


def test_the_state_is_kept_in_order_over_several_headers():
    parent = read_parent([RIGHT], ["rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE", "tenant@vendor=a b"])
    assert parent.state == (("rojo", "00f067aa0ba902b7"), ("congo", "t61rcWkgMzE"), ("tenant@vendor", "a b"))


@pytest.mark.parametrize(
    "wrong",
    ["rojo", "=1", "Rojo=1", "a=1,a=2", "a=\x01", "a=ü", ",".join(f"k{n}=1" for n in range(33)), "a=" + "x" * 4000],
)
def test_a_wrong_state_is_dropped_and_the_trace_is_not(wrong):
    assert read_parent([RIGHT], [wrong]) == read_parent([RIGHT])
