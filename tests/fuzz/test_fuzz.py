"""A short fuzzing run of each target in every test run, a longer one with ``--slow``, and whether faults would be found."""

from __future__ import annotations

import ctypes
import os
import signal

import msgpack
import msgspec
import pytest
from tests.fuzz import fuzzing, pictures, recordings
from tests.fuzz.__main__ import main
from tests.fuzz.fuzzing import MEMORY, Finding, execute, fuzz, time_limit
from tests.fuzz.media import MEMORY as MEDIA_MEMORY
from tests.fuzz.media import Media
from tests.fuzz.targets import TARGETS

from mmprep import layout
from mmprep.errors import FetchError, TooLarge
from mmprep.wire import codec
from mmprep_frontend.injection import item
from mmprep_worker.audio import waveform
from mmprep_worker.images import decode
from mmprep_worker.ring import recovery

#: How often each target is executed, and how many different outcomes that has at least. Formats of pictures have targets
#: of their own for long runs; here they are in ``pictures``.
NORMAL = {
    "wire": (20_000, 200),
    "directory": (1000, 25),
    "address": (20_000, 20),
    "injections": (10_000, 60),
    "pictures": (3000, 60),
    "videos": (4000, 16),
    "recordings": (1000, 40),
}
SECONDS_AT_LENGTH = 120.0


@pytest.fixture(autouse=True)
def limited():
    with time_limit():
        yield


_decode_jpeg = decode.simplejpeg.decode_jpeg


class Echo:
    """A target that does what its input says."""

    name = "echo"

    def corpus(self):
        return [b"fine"]

    def mutate(self, rng, _data, _corpus):
        return bytes([rng.randrange(4)])

    def run(self, data):
        if data == b"\3":
            raise ZeroDivisionError("three")
        if data == b"much":
            bytearray(MEMORY)
        return "accepted"

    def close(self):
        """Nothing was opened."""


def misbehave(data):
    """Do what the input says, in the process of a decoder."""
    match data:
        case b"crash":
            ctypes.string_at(0)
        case b"leave":
            os._exit(3)
        case b"hang":
            signal.pause()
        case b"eat":
            bytearray(MEDIA_MEMORY)
        case b"raise":
            raise ZeroDivisionError("nothing")
        case b"stray":
            raise FetchError("a decoder fetches nothing")
        case b"refuse":
            raise TooLarge("7 bytes")
    return "accepted"


def decode_loosely(data):
    """Decode with a fault: what is missing or broken in a JPEG is made up."""
    decode.simplejpeg.decode_jpeg = lambda data, space, **_: _decode_jpeg(data, space, strict=False)
    return pictures.decode(data)


def hear_loosely(data):
    """Decode with a fault: of several channels the first is taken for all."""
    waveform._mono = lambda block: block[:, 0].copy()
    return recordings.decode(data)


@pytest.fixture
def misbehaving():
    target = Media("misbehaving", "tests.fuzz.test_fuzz:misbehave", lambda: [b"fine"], lambda _rng, data, _others: data)
    yield target
    target.close()


@pytest.mark.parametrize("name", NORMAL)
def test_no_bytes_get_more_out_of_it_than_its_errors(name):
    executions, outcomes = NORMAL[name]
    done = fuzz(TARGETS[name], seed=1, executions=executions)
    print(f"{name}: {done}")  # noqa: T201 -- shown with -rP
    assert done.executions == executions
    assert len(done.outcomes) >= outcomes, "the inputs are no longer different enough"
    assert done.accepted >= executions // 100, "too few inputs came past the checks"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_get_more_out_of_it_than_its_errors_for_minutes(name):
    print(f"{name}: {fuzz(TARGETS[name], seed=2, seconds=SECONDS_AT_LENGTH)}")  # noqa: T201 -- shown with -rP


@pytest.mark.parametrize("name", NORMAL)
def test_a_seed_makes_the_same_inputs_again(name):
    executions = len(TARGETS[name].corpus()) + 60
    first, again, other = (fuzz(TARGETS[name], seed=seed, executions=executions) for seed in (3, 3, 4))
    assert (first.digest, first.outcomes) == (again.digest, again.outcomes)
    assert first.digest != other.digest


def test_a_finding_is_a_line_that_can_be_replayed():
    with pytest.raises(Finding, match="ZeroDivisionError: three") as caught:
        fuzz(Echo(), seed=0, executions=100)
    assert str(caught.value).endswith("\nreplay: ./scripts/fuzz echo --replay 03")
    with pytest.raises(Finding):
        execute(Echo(), caught.value.data)


def test_an_execution_that_takes_too_much_memory_is_a_finding():
    with pytest.raises(Finding, match="bytes"):
        execute(Echo(), b"much")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"crash", "died: SIGSEGV"),
        (b"leave", "died: status 3"),
        (b"raise", "ZeroDivisionError: nothing"),
        (b"stray", "another kind: FetchError"),
    ],
)
def test_a_decoder_that_crashes_or_raises_something_else_is_a_finding_and_the_next_input_is_run(
    misbehaving, data, said
):
    assert execute(misbehaving, b"fine") == "accepted"
    with pytest.raises(Finding, match=said):
        execute(misbehaving, data)
    assert execute(misbehaving, b"fine") == "accepted"


def test_a_decoder_that_never_ends_is_a_finding_and_its_process_is_killed(misbehaving, monkeypatch):
    assert execute(misbehaving, b"fine") == "accepted"
    child = misbehaving._child._process
    monkeypatch.setattr(fuzzing, "STUCK", 0.2)
    with pytest.raises(Finding, match="seconds"):
        execute(misbehaving, b"hang")
    assert child.returncode == -signal.SIGKILL
    monkeypatch.undo()
    assert execute(misbehaving, b"fine") == "accepted"


def test_a_decoder_has_no_more_memory_than_it_is_given_and_its_errors_are_outcomes(misbehaving):
    assert execute(misbehaving, b"eat") == "MemoryError"
    assert execute(misbehaving, b"refuse") == "TooLarge: # bytes"


def test_a_fault_planted_in_a_decoders_process_is_found():
    target = Media("planted", "tests.fuzz.test_fuzz:decode_loosely", pictures.corpus, pictures.mutate)
    with pytest.raises(Finding, match="Pillow"):
        fuzz(target, seed=1, executions=NORMAL["pictures"][0])


def test_a_fault_planted_in_the_process_that_hears_is_found():
    target = Media("planted", "tests.fuzz.test_fuzz:hear_loosely", recordings.corpus, recordings.mutate)
    with pytest.raises(Finding, match="other samples"):
        fuzz(target, seed=1, executions=NORMAL["recordings"][0])


class Lax:
    """A decoder of messages that builds whatever comes before it looks at the schema, and takes text for numbers."""

    def __init__(self, kind):
        self._kind = kind

    def decode(self, frame):
        plain = msgpack.unpackb(frame, max_array_len=1 << 14, strict_map_key=False)
        return msgspec.convert(plain, self._kind, strict=False, builtin_types=(bytes,))


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "fault"),
    [
        ("wire", codec, "decoder", Lax),
        ("directory", recovery, "_overlapping", lambda _records: set()),
        ("address", layout.Record, "readable", property(lambda _record: True)),
        ("injections", item, "_check_bytes", lambda _name, _given: None),
    ],
)
def test_a_planted_fault_is_found(name, owner, attribute, fault, monkeypatch):
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(Finding):
        fuzz(TARGETS[name], seed=1, executions=NORMAL[name][0])


def test_a_frame_that_claims_lists_within_lists_would_be_found(monkeypatch):
    monkeypatch.setattr(codec, "decoder", Lax)
    with pytest.raises(Finding, match="bytes"):
        execute(TARGETS["wire"], b"\0" + b"\xdc\x40\x00" * 600)


def test_the_command_replays_one_input(monkeypatch, capsys):
    frame = b"\0" + msgpack.packb(["Cancel", 7])
    monkeypatch.setattr("sys.argv", ["fuzz", "wire", "--replay", frame.hex()])
    assert main() == 0
    assert capsys.readouterr().out == "accepted Cancel\n"
