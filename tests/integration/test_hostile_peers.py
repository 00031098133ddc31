"""What is sent to the service's own sockets by processes that do not speak the protocol: refused, counted, harmless."""

import json
import os
from contextlib import contextmanager

import msgpack
import pytest
import zmq
from tests.integration.service import eventually, photo, serving, user

from mmprep import Backend, Client, InvalidRequest, LeaseLost, ProtocolError, StaleAddress
from mmprep.process_lock import ProcessLock
from mmprep.runtime import RuntimeDir
from mmprep.wire import messages
from mmprep.wire.codec import CONTROL_LIMIT, MAX_FRAMES, PROTOCOL, pack, unpack

NAN = msgpack.packb(["Renew", float("nan"), [], None])
NOT_MESSAGES = {
    "no bytes": [b""],
    "no MessagePack": [b"\xc1"],
    "cut off": [pack(messages.Clear(1))[:-1]],
    "bytes behind it": [pack(messages.Clear(1)) + b"\x00"],
    "another message's fields": [msgpack.packb(["Clear", 1, 2, 3])],
    "an unknown message": [msgpack.packb(["Format", 1])],
    "another link's message": [pack(messages.LaneReady(0, bytes(32), b""))],
    "not a number": [NAN],
    "a key twice": [b"\x82\xa1a\x01\xa1a\x02"],
    "an extension type": [msgpack.packb(msgpack.ExtType(5, b"abc"))],
    "deep nesting": [b"\x91" * 5000 + b"\xc0"],
    "a length that lies": [b"\xdd\xff\xff\xff\xff"],
    "two frames": [pack(messages.Clear(1)), b"more"],
    "too many frames": [b"x"] * (MAX_FRAMES + 9),
    "a negative number": [msgpack.packb(["Acquire", 1, -1, 5, "copy"])],
    "a huge number": [msgpack.packb(["Acquire", 1, 0, 2**63, "copy"])],
    "another version": [pack(messages.Hello(PROTOCOL + 1, "9", "backend", "guest", os.getpid()))],
    "no hello": [pack(messages.Renew(1, ()))],
    "a role without a say": [pack(messages.Hello(PROTOCOL, "1", "lane", "0", os.getpid()))],
    "a name that is a path": [msgpack.packb(["Hello", PROTOCOL, "1", "backend", "../../x", 1, b""])],
}


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "16MiB", "--frontends", 1) as running:
        yield running


@pytest.fixture
def unchanged(service):
    """Check that a test leaves leases, pins and the ring as they were, and the service at work."""
    service.render(user(photo("cat.png")))
    before = service.quiet()
    yield
    after = service.quiet()
    for part in ("ring", "queues", "lanes", "worker", "frontends", "segment"):
        assert after[part] == before[part]
    assert service.render(user(photo("cat.png")))["features"]


@contextmanager
def peer(endpoint, kind=zmq.DEALER):
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 1000
        socket.rcvtimeo = 60_000
        socket.connect(endpoint)
        yield socket


def refused(service, link):
    return sum(
        count for name, count in service.metrics().items() if name.startswith("mmprep_refused_total{") and link in name
    )


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", NOT_MESSAGES)
def test_the_writer_refuses_what_is_no_message_and_says_so(service, name):
    before = refused(service, 'link="writer"')
    with peer(RuntimeDir(service.runtime_dir).writer) as socket:
        socket.send_multipart(NOT_MESSAGES[name])
        (frame,) = socket.recv_multipart()
    answer = unpack(frame, messages.FromWriter)
    assert isinstance(answer, messages.Refused)
    assert isinstance(answer.fault.error(), ProtocolError)
    assert refused(service, 'link="writer"') == before + 1


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", sorted(NOT_MESSAGES.keys() - {"no hello", "a role without a say", "two frames"}))
def test_a_frontend_refuses_what_is_no_message_and_says_so(service, name):
    (endpoint,) = RuntimeDir(service.runtime_dir).frontends()
    before = refused(service, 'link="native"')
    with peer(endpoint) as socket:
        socket.send_multipart(NOT_MESSAGES[name])
        (frame,) = socket.recv_multipart()
    assert isinstance(unpack(frame, messages.FromFrontend), messages.Refused)
    assert refused(service, 'link="native"') == before + 1


@pytest.mark.usefixtures("unchanged")
def test_a_frame_above_the_limit_ends_the_connection(service):
    with peer(RuntimeDir(service.runtime_dir).writer) as socket:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send(bytes(CONTROL_LIMIT + 1))
        assert monitor.poll(60_000)
        socket.disable_monitor()
        monitor.close(0)


@pytest.mark.usefixtures("unchanged")
def test_what_strangers_say_to_the_lanes_and_bulk_sockets_is_counted(service):
    runtime = RuntimeDir(service.runtime_dir)
    for endpoint, kind, link in ((runtime.lanes, zmq.DEALER, "lanes"), (runtime.writer_bulk, zmq.PUSH, "bulk")):
        before = refused(service, f'link="{link}"')
        with peer(endpoint, kind) as socket:
            for name in ("no MessagePack", "too many frames", "deep nesting"):
                socket.send_multipart(NOT_MESSAGES[name])
            eventually(lambda link=link, before=before: refused(service, f'link="{link}"') == before + 3, "the count")


@pytest.mark.usefixtures("unchanged")
def test_nobody_is_a_reader_without_the_process_lock_of_his_name(service):
    """Else one message could end the leases of another process, which reads on."""
    with Client(service.endpoint, backend_id="victim") as client:
        item = client.chat(user(photo("cat.png")), payload="shm", lease_kind="view").items["image"][0]
        with item.view() as arrays, peer(RuntimeDir(service.runtime_dir).writer) as socket:
            before = arrays["pixel_values"].copy()
            socket.send(pack(messages.Hello(PROTOCOL, "1", "backend", "victim", 1, b"other")))
            assert isinstance(unpack(socket.recv(), messages.FromWriter), messages.Refused)
            leases = {backend["id"]: backend["leases"] for backend in service.status()["backends"]}
            assert leases["victim"] == 1
            assert (arrays["pixel_values"] == before).all()


@contextmanager
def guest(service):
    """Be a backend that speaks the protocol by hand; give a function that sends a message and returns the answer."""
    runtime = RuntimeDir(service.runtime_dir)
    lock = ProcessLock(runtime.lock_path("backend", "guest"))
    assert lock.acquire()
    lock.note(b"guest")
    try:
        with peer(runtime.writer) as socket:

            def ask(message):
                socket.send(pack(message))
                return unpack(socket.recv(), messages.FromWriter)

            welcome = ask(messages.Hello(PROTOCOL, "1", "backend", "guest", os.getpid(), b"guest"))
            assert isinstance(welcome, messages.WriterWelcome)
            yield ask
    finally:
        lock.remove()


@pytest.mark.usefixtures("unchanged")
def test_a_backend_gets_nothing_by_asking_for_what_is_not_its(service):
    with Backend(service.endpoint, id="owner") as backend, guest(service) as ask:
        answer = service.render(user(photo("cat.png")), mm_payload="shm", backend_id="owner")
        address = answer["features"]["mm_addresses"]["image"][0]
        lease = bytes.fromhex(address["lease"])
        slot, generation = address["slot"], address["generation"]
        assert ask(messages.Renew(1, (lease, bytes(16)))).lost == (lease, bytes(16))
        assert ask(messages.Release(2, (lease, bytes(16)))) == messages.Done(2)
        errors = [
            (messages.Upgrade(3, lease, "view"), LeaseLost),
            (messages.Upgrade(4, bytes(16), "copy"), LeaseLost),
            (messages.Acquire(5, slot, generation + 1, "copy"), StaleAddress),
            (messages.Acquire(6, 2**40, generation, "copy"), StaleAddress),
            (messages.Offer(7, "plan", 1, 0, (messages.Offered(bytes(32), "image", 1, 1),)), InvalidRequest),
        ]
        for message, error in errors:
            failed = ask(message)
            assert isinstance(failed, messages.Failed), message
            assert type(failed.fault.error()) is error
        assert ask(messages.Reassert(8, (messages.Held(bytes(16), slot, 1, "view"),), True)).lost
        acquired = ask(messages.Acquire(9, slot, generation, "copy"))
        assert isinstance(acquired, messages.Acquired)
        for _ in range(2):  # again is no error
            assert ask(messages.Release(10, (acquired.lease,))) == messages.Done(10)
        assert ask(messages.Renew(11, (acquired.lease,))).lost == (acquired.lease,)
        assert backend.renew(address) == [True]
        item = backend.open(address)
        assert item.materialize()["pixel_values"].any()
        item.release()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "forged", [{"generation": -1}, {"generation": 2**63}, {"offset": -64}, {"slot": 2**60}, {"epoch": "0" * 32}]
)
def test_a_forged_address_leases_nothing(service, forged):
    with Backend(service.endpoint, id="forger") as backend:
        answer = service.render(user(photo("cat.png")), mm_payload="shm", backend_id="forger")
        address = answer["features"]["mm_addresses"]["image"][0]
        plain = json.loads(json.dumps({name: value for name, value in address.items() if not name.startswith("lease")}))
        with pytest.raises((InvalidRequest, StaleAddress)):
            backend.acquire(plain | forged)
        backend.release(address)
