"""Backends on another host: real processes over tcp with CURVE, on the loopback, where tensors travel because they are told to."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from tests.integration.faulty import Gates
from tests.integration.service import (
    DATA,
    decode_item,
    environment,
    eventually,
    is_alive,
    photo,
    private_bytes,
    serving,
    text,
    user,
)

from mmprep import (
    AsyncBackend,
    AuthenticationError,
    Backend,
    Client,
    InvalidRequest,
    LeaseLost,
    ServiceUnavailable,
    StaleAddress,
    StaleDelivery,
)
from mmprep.address import parse_address
from mmprep.cli.desk import DeskClient
from mmprep.errors import MmprepError
from mmprep.failpoints import VARIABLE
from mmprep.reading import LocalReader
from mmprep.remote.curve import make_pair, read_public, read_secret
from mmprep.wire import messages
from mmprep.wire import remote_messages as remote
from mmprep.wire.codec import PROTOCOL, pack, unpack

CAT = (DATA / "cat.png").read_bytes()
CHAT = user({"type": "image_url", "image_url": {"url": CAT}}, text("What is it?"))
LEASE_SECONDS = 5
#: By label; where the door comes by when tensors are received, and a job.
DOOR = {
    "chunks are asked for": "remote.ask.received",
    "a chunk was sent": "remote.chunk.sent",
    "a job was sent": "remote.job.sent",
}

#: Opens the item at an address, pulls a job, says so, and waits.
HOLDER = """
import json, sys
from mmprep import Backend

endpoint, key, server, id = sys.argv[1:]
keys = {"curve_key_file": key, "curve_server_key_file": server}
with Backend(endpoint, id=id, queue="held", transport="tcp", **keys) as backend:
    print("connected", flush=True)
    item = backend.open(json.loads(sys.stdin.readline()))
    with item.view() as arrays:
        print(int(arrays["pixel_values"].sum()), flush=True)
        job = backend.pull()
        print(job.id, flush=True)
        sys.stdin.readline()
        print(int(arrays["pixel_values"].sum()), backend.renew(item.address), flush=True)
"""


@pytest.fixture(scope="module")
def keys():
    """Give a directory with key pairs, and one with the public keys of the clients that may connect."""
    directory = Path(tempfile.mkdtemp(prefix="mmprep-keys-", dir="/tmp"))
    for name in ("service", "engine", "guest", "stranger"):
        make_pair(directory, name)
    clients = directory / "clients"
    clients.mkdir()
    for name in ("engine", "guest"):
        shutil.copy(directory / f"{name}.pub", clients)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def gates(keys):
    return Gates(keys, {label: f"{point}=kill" for label, point in DOOR.items()})


@pytest.fixture(scope="module")
def service(keys, gates):
    options = ("--curve-key-file", keys / "service.key", "--curve-clients-dir", keys / "clients")
    limits = ("--lease-seconds", LEASE_SECONDS, "--cache-size", "32MiB")
    armed = {VARIABLE: gates.variable}
    with serving("--remote-endpoint", "tcp://127.0.0.1:0", *options, *limits, env=armed) as running:
        yield running


@pytest.fixture(scope="module")
def door(service):
    return service.status()["remote"]["endpoint"]


@pytest.fixture(scope="module")
def connect(door, keys):
    """Return what connects a backend to the door, with a key."""

    def backend(*, key="engine", server="service", kind=Backend, **arguments):
        files = {"curve_key_file": keys / f"{key}.key", "curve_server_key_file": keys / f"{server}.pub"}
        return kind(door, **{"transport": "tcp", **files, **arguments})

    return backend


@pytest.fixture(autouse=True)
def _quiet(service):
    """Check that after a test nobody has anything any more."""
    yield
    with DeskClient(str(service.runtime_dir)) as desk:
        eventually(lambda: _is_left(desk.status()), "a service without backends and leases")


def _is_left(status):
    queues = status["queues"].values()
    far = status.get("remote", {"backends": "not known while there is no door"})["backends"]
    return not (status["backends"] or far or status["pins"] or any(q["depth"] for q in queues))


def address_for(service, backend_id, name="rocket.jpg", **fields):
    answer = service.render(user(photo(name)), mm_payload="shm", backend_id=backend_id, **fields)
    return answer["features"]["mm_addresses"]["image"][0]


def refused(service, error):
    return service.metrics().get(f'mmprep_refused_total{{error="{error}",link="remote"}}', 0)


def leases_of(service, backend_id):
    """Return how many leases a backend has with the writer; ``None``: there is no such backend."""
    with DeskClient(str(service.runtime_dir)) as desk:  # a fraction of the command's time
        return next((b["leases"] for b in desk.status()["backends"] if b["id"] == backend_id), None)


# --- the same as on the host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
def test_what_is_received_is_what_lies_in_shared_memory_to_the_bit(service, connect, dtype):
    with connect(id="far") as far, Backend(service.endpoint, id="near") as near:
        items = [b.open(address_for(service, b.id, mm_dtype=dtype)) for b in (far, near)]
        received, local = (item.materialize() for item in items)
        assert received.keys() == local.keys()
        for name, array in received.items():
            assert (array.dtype, array.shape) == (local[name].dtype, local[name].shape)
            assert array.tobytes() == local[name].tobytes()
        assert items[0].fields == items[1].fields
        with items[0].view() as arrays:
            assert not any(array.flags.writeable for array in arrays.values())
            assert all(array.ctypes.data % 64 == 0 for array in arrays.values())
        assert far.renew(items[0].address) == [True]
        assert leases_of(service, "far") == 1
        items[0].release()
        eventually(lambda: leases_of(service, "far") == 0, "the end of the lease")
        with pytest.raises(LeaseLost):
            items[0].materialize()
        assert far.renew(items[0].address) == [False]
        again = far.acquire(items[0].address)
        assert all((again.materialize()[name] == array).all() for name, array in local.items())


def test_a_service_on_the_same_host_is_found_and_its_shared_memory_used(service, connect, door, keys):
    with connect(id="both", transport="auto", queue="both") as backend, Client(service.endpoint) as client:
        assert isinstance(backend._backend._reader, LocalReader)
        posted = client.post(CHAT, queue="both")
        job = backend.pull()
        assert job.id == posted
        job.ack()
    files = {"curve_key_file": keys / "engine.key", "curve_server_key_file": keys / "service.pub"}
    with Client(door, **files) as client:
        assert client.chat(CHAT).items["image"][0].address is not None


def test_jobs_are_pulled_and_ended_as_on_the_host(service, connect):
    async def work():
        async with connect(kind=AsyncBackend, queue=["far", "away"], credits=2) as backend:
            posted = [client.post(CHAT, queue=queue) for queue in ("far", "away", "far")]
            got = []
            async for job in backend:
                async with job.view() as items:
                    sums.append(int(items["image"][0]["pixel_values"].sum(dtype=np.int64)))
                await (job.nack() if job.attempt == 1 and job.id == posted[0] else job.ack(wait=len(got) % 2 == 0))
                got.append((job.id, job.attempt))
                if len(got) == 4:
                    await backend.drain()
            with pytest.raises(InvalidRequest, match="already"):
                await job.release()
            return posted, got

    sums = []
    with Client(service.endpoint) as client:
        posted, got = asyncio.run(work())
        with Backend(service.endpoint, queue="far") as near:
            client.post(CHAT, queue="far")
            job = near.pull()
            with job.view() as items:
                assert sums == 4 * [int(items["image"][0]["pixel_values"].sum(dtype=np.int64))]
            job.ack()
    assert sorted(got) == sorted([*((job_id, 1) for job_id in posted), (posted[0], 2)])


def test_jobs_of_several_items_come_whole_where_there_is_room_for_one_at_a_time(service, connect):
    pictures = [photo("cat.png"), photo("rocket.jpg")]
    answer = service.render(user(*pictures), mm_dtype="uint8")
    expected = [decode_item(element)["pixel_values"].array for element in answer["features"]["kwargs_data"]["image"]]
    limit = int(1.5 * sum(array.nbytes for array in expected))
    with connect(queue="narrow", credits=3, receive_limit=limit) as backend:
        for _ in range(3):
            assert service.chat(user(*pictures), mm_dtype="uint8", queue="narrow").status == 202
        for _ in range(3):
            job = backend.pull()
            with job.view() as items:
                for arrays, array in zip(items["image"], expected, strict=True):
                    assert (arrays["pixel_values"] == array).all()
            assert job.attempt == 1
            job.ack()


def test_a_backend_receives_no_more_than_its_limit_at_a_time(service, connect):
    with connect(id="small", receive_limit=3 << 20) as backend:
        address = address_for(service, "small", mm_dtype="uint8")
        first = backend.open(address)
        with ThreadPoolExecutor(1) as thread:
            second = thread.submit(backend.acquire, address)
            eventually(lambda: leases_of(service, "small") == 2, "a second lease")
            assert not second.done()
            first.release()
            second.result().release()
        with pytest.raises(MmprepError, match="receive_limit"):
            backend.acquire(address_for(service, "small", mm_dtype="float32"))


# --- who may connect --------------------------------------------------------------------------------------------------


def test_who_has_not_the_right_keys_is_told_so_and_counted_and_disturbs_nobody(service, connect, door, keys):
    plain = {"curve_key_file": None, "curve_server_key_file": None}
    before = refused(service, "unknown key"), refused(service, "handshake")
    with connect(id="inside") as inside:
        for arguments, said in (
            ({"key": "stranger"}, "does not know this backend's key"),
            ({"server": "stranger"}, "curve_server_key_file is not this service's key"),
            (plain, "the service wants keys"),
        ):
            with pytest.raises(AuthenticationError, match=said) as caught:
                connect(id="outside", **arguments)
            assert str(keys) not in caught.value.message
        for said in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 8, bytes(range(256))):
            with socket.create_connection(("127.0.0.1", int(door.rpartition(":")[2]))) as stranger:
                stranger.sendall(said)
                with suppress(ConnectionError):
                    while stranger.recv(4096):
                        pass
        assert (refused(service, "unknown key"), refused(service, "handshake")) == (before[0] + 1, before[1] + 2)
        inside.open(address_for(service, "inside")).release()
        with pytest.raises(InvalidRequest, match="living process"):
            connect(id="inside")
        with pytest.raises(InvalidRequest, match="living process"):
            connect(id="inside", key="guest")
        assert inside.renew(inside.open(address_for(service, "inside")).address) == [True]
    assert leases_of(service, "outside") is None


def test_a_key_that_is_put_there_lets_in_and_one_that_is_removed_ends_the_connection(service, connect, keys):
    allowed = keys / "clients" / "stranger.pub"
    shutil.copy(keys / "stranger.pub", allowed)

    def connected():
        try:
            return connect(id="late", key="stranger")
        except AuthenticationError:
            return None

    with eventually(connected, "a key that is known") as backend:
        item = backend.open(address_for(service, "late"))
        allowed.unlink()
        eventually(lambda: leases_of(service, "late") is None, "the end of the session")
        with pytest.raises(AuthenticationError, match="does not know this backend's key"):
            backend.renew(item.address)
        assert item.materialize()["pixel_values"].any()


# --- peers that break the rules ---------------------------------------------------------------------------------------


class Peer:
    """Speaks the protocol by hand."""

    def __init__(self, door, keys, name, *, most=1000):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 60_000
        self.socket.rcvhwm = most
        public, secret = read_secret(keys / "engine.key", "key")
        self.socket.curve_publickey, self.socket.curve_secretkey = public, secret
        self.socket.curve_serverkey = read_public(keys / "service.pub", "key")
        self.socket.connect(door)
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)

    def say(self, message, *frames):
        self.socket.send_multipart([message if isinstance(message, bytes) else pack(message), *frames])

    def hear(self, kind):
        """Return the next message of a type, passing over signs of life, and its frames."""
        while True:
            header, *frames = self.socket.recv_multipart()
            message = unpack(header, remote.FromDoor)
            if not isinstance(message, remote.Alive):
                assert isinstance(message, kind), message
                return message, frames

    def hello(self, protocol=PROTOCOL):
        self.say(remote.RemoteHello(protocol, "0", self.name, os.urandom(16), (), 0, b""))
        return self

    def welcomed(self):
        self.hello()
        self.welcome = self.hear(remote.RemoteWelcome)[0]
        return self

    def open(self, address, call=1):
        place = parse_address(address)
        plain = remote.RemoteAddress(
            place.segment,
            bytes.fromhex(place.epoch),
            place.slot,
            place.offset,
            place.length,
            place.generation,
            place.metadata_length,
        )
        lease = None if place.lease is None else bytes.fromhex(place.lease)
        self.say(remote.Open(call, plain, lease, "copy"))
        return self.hear(remote.Opened)[0].lease

    def ended(self):
        return self.hear(remote.Ended)[0].fault


@pytest.fixture
def peer(door, keys):
    with Peer(door, keys, "raw") as peer:
        yield peer.welcomed()


@pytest.fixture
def thief(door, keys):
    with Peer(door, keys, "thief") as thief:
        yield thief.welcomed()


def chunks_of(address, peer):
    """Return how many chunks an item has, and that it is large enough for the tests below."""
    place = parse_address(address)
    count = -(-(place.length - place.metadata_length) // peer.welcome.chunk)
    assert count >= 3
    return count


@pytest.mark.parametrize("case", ["beyond", "twice", "credits", "received", "after", "unknown", "another's"])
def test_chunks_that_may_not_be_asked_for_are_refused_and_the_session_goes_on(service, peer, thief, case):
    address = address_for(service, "raw", mm_dtype="float32")
    count = chunks_of(address, peer)
    lease = peer.open(address)
    asks = {
        "beyond": [(count + 1, 0)],
        "twice": [(1, 0), (1, 0)],
        "credits": [(peer.welcome.credits + 1, 0)],
        "received": [(1, 0), (2, 2)],
    }
    if case in asks:
        for upto, received in asks[case]:
            peer.say(remote.Ask(lease, upto, received))
        for _ in asks[case][1:]:
            peer.hear(remote.Chunk)
        fault = peer.ended()
        assert fault.kind == "ProtocolError"
    elif case == "after":
        peer.say(messages.Release(0, (lease,)))
        peer.say(remote.Ask(lease, 1, 0))
        assert peer.ended().kind == "LeaseLost"
    elif case == "unknown":
        peer.say(remote.Ask(bytes(16), 1, 0))
        assert peer.ended().kind == "LeaseLost"
    else:
        thief.say(remote.Ask(lease, 1, 0))
        assert thief.ended().kind == "LeaseLost"
        thief.say(messages.Renew(7, (lease,)))
        assert thief.hear(messages.Renewed)[0].lost == (lease,)
        thief.say(messages.Release(8, (lease,)))
        thief.hear(messages.Done)
    again = peer.open({**address, "lease": None}, call=9)
    peer.say(remote.Ask(again, 1, 0))
    assert peer.hear(remote.Chunk)[0] == remote.Chunk(again, 0)


@pytest.mark.parametrize(
    "garbage",
    [
        [b"\xc1"],
        [pack(messages.Clear(1))],
        [pack(messages.Renew(1, (), "engine-0"))],
        [pack(remote.Alive()), b"more"],
        [b"\xdd\xff\xff\xff\xff"],
    ],
    ids=["no message", "another link's", "in another's name", "two frames", "a length that lies"],
)
def test_what_is_no_message_of_a_backend_ends_its_session(service, peer, garbage):
    peer.open(address_for(service, "raw"))
    peer.socket.send_multipart(garbage)
    assert peer.hear(messages.Refused)[0].fault.kind == "ProtocolError"
    eventually(lambda: leases_of(service, "raw") is None, "the end of the session")


def test_another_version_and_whoever_does_not_say_hello_are_refused(door, keys, service):
    before = refused(service, "ProtocolError")
    with Peer(door, keys, "old") as old:
        old.hello(PROTOCOL + 1)
        assert "use one version" in old.hear(messages.Refused)[0].fault.message
    with Peer(door, keys, "rude") as rude:
        rude.say(messages.Renew(1, ()))
        assert "hello" in rude.hear(messages.Refused)[0].fault.message
    assert refused(service, "ProtocolError") == before + 2


# --- peers that do not go on ------------------------------------------------------------------------------------------


def test_a_backend_that_lives_and_does_not_read_loses_its_lease_in_time(service, peer):
    lease = peer.open(address_for(service, "raw", mm_dtype="float32"))
    peer.say(remote.Ask(lease, 2, 0))

    def lost():
        peer.say(remote.Alive())
        return leases_of(service, "raw") == 0

    eventually(lost, "the end of the lease")
    assert [peer.hear(remote.Chunk)[0].number for _ in range(2)] == [0, 1]
    assert peer.ended().kind == "LeaseLost"
    assert service.metrics()['mmprep_remote_pulls_total{outcome="stalled"}'] >= 1


def test_a_backend_that_says_it_reads_and_does_not_costs_the_door_little_and_is_given_up(service, door, keys):
    def given_up():
        return service.metrics().get('mmprep_remote_sessions_total{end="not reading"}', 0)

    before = given_up()
    pid = service.status()["remote"]["pid"]
    with Peer(door, keys, "liar", most=1) as liar:
        address = address_for(service, liar.welcomed().name, mm_dtype="float32") | {"lease": None}
        count = chunks_of(address, liar)
        leases = [liar.open(address, call) for call in range(1, 41)]
        assert len(leases) * count * liar.welcome.chunk > 256 << 20
        for lease in leases:
            liar.say(remote.Ask(lease, count, 0))
            liar.say(remote.Ask(lease, count, count))
        eventually(lambda: given_up() == before + 1, "the end of its session")
        assert private_bytes(pid) < 256 << 20


def test_an_address_whose_content_is_gone_and_a_forged_one_are_errors(service, connect):
    with connect(id="late") as backend:
        item = backend.open(address_for(service, "late"))
        address = json.loads(msgspec.json.encode(item.address)) | {"lease": None}
        item.release()
        for forged, error in (
            ({"slot": 1 << 40}, InvalidRequest),
            ({"offset": address["offset"] + 64}, StaleAddress),
            ({"generation": address["generation"] + 1}, StaleAddress),
            ({"metadata_length": 1}, InvalidRequest),
            ({"length": 1 << 40}, InvalidRequest),
        ):
            with pytest.raises(error):
                backend.acquire(address | forged)
        eventually(lambda: leases_of(service, "late") == 0, "the end of all leases")
        assert service.post("/reset_mm_cache", {}).status == 200
        with pytest.raises(StaleAddress):
            backend.acquire(address)


@contextmanager
def holder(service, door, keys, name):
    """Give a process that holds an item and a job, the sum of the item's pixels, and the job's id."""
    command = [sys.executable, "-c", HOLDER, door, keys / "engine.key", keys / "service.pub", name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(list(map(str, command)), text=True, env=environment(), **pipes) as process:
        try:
            assert process.stdout.readline() == "connected\n"
            process.stdin.write(json.dumps(address_for(service, name)) + "\n")
            process.stdin.flush()
            total = int(process.stdout.readline())
            with Client(service.endpoint) as client:
                posted = client.post(CHAT, queue="held")
            assert process.stdout.readline() == f"{posted}\n"
            yield process, total, posted
        finally:
            process.kill()


def test_a_backend_that_is_killed_has_nothing_any_more_and_its_job_goes_to_another(service, door, keys, connect):
    with holder(service, door, keys, "mortal") as (process, _, posted):
        process.kill()
        with connect(queue="held") as heir:
            job = heir.pull(60)
            assert (job.id, job.attempt) == (posted, 2)
            job.ack()
        eventually(lambda: leases_of(service, "mortal") is None, "the end of the session")
        with connect(id="mortal"):
            pass


def test_a_backend_that_is_stopped_is_given_up_after_a_leases_time_and_keeps_what_it_received(
    service, door, keys, connect
):
    with holder(service, door, keys, "sleeper") as (process, total, posted):
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: leases_of(service, "sleeper") is None, "the end of the session")
        process.send_signal(signal.SIGCONT)
        with connect(queue="held") as heir:
            job = heir.pull(60)
            assert (job.id, job.attempt) == (posted, 2)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{total} [False]\n"
            job.ack()
        assert process.wait(60) == 0


def test_a_pull_goes_on_when_the_writer_dies_in_the_middle_of_it(service, peer):
    with Backend(service.endpoint, id="near") as near:
        item = near.open(address_for(service, "near", mm_dtype="float32"))
        expected = item.materialize()["pixel_values"].tobytes()
        address = address_for(service, "raw", mm_dtype="float32")
        count = chunks_of(address, peer)
        lease = peer.open(address)
        peer.say(remote.Ask(lease, 1, 0))
        data = [peer.hear(remote.Chunk)[1][0]]
        writer = service.pids()["writer"][0]
        os.kill(writer, signal.SIGKILL)
        eventually(lambda: not is_alive(writer), "the end of the writer")
        for number in range(1, count):
            peer.say(remote.Ask(lease, number + 1, number))
            data.append(peer.hear(remote.Chunk)[1][0])
        peer.say(remote.Ask(lease, count, count))
        assert b"".join(data)[: len(expected)] == expected
        with DeskClient(str(service.runtime_dir)) as desk:

            def another():
                peer.say(remote.Alive())
                status = desk.status()
                known = any(backend["id"] == "raw" for backend in status.get("backends", ()))
                return known and status.get("worker", {}).get("pid") not in {None, writer}

            eventually(another, "a new writer that knows of the lease")
        peer.say(messages.Renew(5, (lease,)))
        assert peer.hear(messages.Renewed)[0].lost == ()


def test_a_backend_connects_again_when_the_door_dies_and_what_it_received_stays(service, connect):
    with connect(id="patient", queue="patient") as backend, Client(service.endpoint) as client:
        item = backend.open(address_for(service, "patient"))
        pixels = item.materialize()["pixel_values"]
        client.post(CHAT, queue="patient")
        job = backend.pull()
        os.kill(service.status()["remote"]["pid"], signal.SIGKILL)
        again = eventually(lambda: _opened(backend, item.address), "a new door")
        assert (again.materialize()["pixel_values"] == pixels).all()
        assert (item.materialize()["pixel_values"] == pixels).all()
        with pytest.raises(StaleDelivery):
            job.ack()
        job = backend.pull(60)
        assert job.attempt == 2
        job.ack()


@pytest.mark.parametrize("label", DOOR)
def test_what_is_under_way_when_the_door_dies_comes_right_from_the_next_one(service, gates, connect, label):
    with connect(id="unlucky", queue="unlucky") as backend, Client(service.endpoint) as client:
        address = address_for(service, "unlucky", mm_dtype="float32")
        with Backend(service.endpoint, id="near") as near:
            expected = near.acquire(address).materialize()["pixel_values"]
        gates.open(label)
        if "job" in label:
            client.post(CHAT, queue="unlucky")
            assert eventually(lambda: _acknowledged(backend), "a job that is this backend's").attempt == 2
        else:
            item = eventually(lambda: _opened(backend, address), "a new door")
            assert (item.materialize()["pixel_values"] == expected).all()
        assert gates.was_taken(label)


def _acknowledged(backend):
    """Return a job that was acknowledged; the first one may be another delivery's by now."""
    job = backend.pull()
    try:
        job.ack()
    except (StaleDelivery, ServiceUnavailable):
        return None
    return job


def _opened(backend, address):
    try:
        return backend.acquire(address)
    except ServiceUnavailable:
        return None
