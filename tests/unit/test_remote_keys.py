"""CURVE keys in files, and where a service or a backend must not go without them."""

import stat

import pytest
import zmq

from mmprep import AsyncBackend
from mmprep.cli.options import parser, resolve
from mmprep.errors import InvalidRequest, StartupError
from mmprep.remote import curve
from mmprep.remote.curve import RemoteKeys, make_pair, read_clients, read_public, read_secret
from mmprep.remote.endpoint import TcpEndpoint, parse_tcp, tcp_to_bind, tcp_to_connect

NOT_KEYS = [b"", b"short", b"~" * 40, b"#" * 40, b"a" * 39, b"a" * 41, b"a" * 39 + b" ", b"\xff" * 40, bytes(40)]


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path / "keys", "engine-0")


def decide(*arguments):
    return resolve(parser("serve", "").parse_args(list(map(str, arguments))), None, {})


def test_a_pair_is_made_whose_secret_key_is_the_owners_alone_and_never_over_another(pair, tmp_path):
    secret, public = pair
    assert (secret.name, public.name) == ("engine-0.key", "engine-0.pub")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = secret.read_bytes(), public.read_bytes()
    assert zmq.curve_public(before[0].strip()) == before[1].strip()
    assert read_secret(secret, "x") == (before[1].strip(), before[0].strip())
    assert read_public(public, "x") == before[1].strip()
    with pytest.raises(StartupError, match="exists already"):
        make_pair(tmp_path / "keys", "engine-0")
    secret.unlink()
    with pytest.raises(StartupError, match="exists already"):
        make_pair(tmp_path / "keys", "engine-0")
    assert not secret.exists()
    assert public.read_bytes() == before[1]
    with pytest.raises(StartupError, match="name"):
        make_pair(tmp_path, "../engine")


@pytest.mark.parametrize("content", NOT_KEYS)
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "engine.key"
    path.write_bytes(content)
    with pytest.raises(StartupError, match="holds no key") as caught:
        read_secret(path, "--curve-key-file")
    assert content.decode("latin-1") not in caught.value.message or len(content) < 6


def test_a_secret_key_that_every_user_may_read_is_refused(pair):
    pair[0].chmod(0o604)
    with pytest.raises(StartupError, match="chmod o="):
        read_secret(pair[0], "--curve-key-file")


def test_clients_are_the_public_keys_of_a_directory_and_a_wrong_file_keeps_nobody_out(pair):
    directory = pair[1].parent
    (directory / "broken.pub").write_bytes(b"no key")
    (directory / "notes.txt").write_bytes(b"who is who")
    make_pair(directory, "engine-1")
    clients, wrong = read_clients(directory)
    assert sorted(clients.values()) == ["engine-0", "engine-1"]
    assert all(len(key) == 32 for key in clients)
    assert wrong == ["broken.pub"]


@pytest.mark.parametrize(
    ("text", "endpoint", "loopback"),
    [
        ("tcp://127.0.0.1:7790", TcpEndpoint("127.0.0.1", 7790), True),
        ("tcp://[::1]:1", TcpEndpoint("::1", 1), True),
        ("tcp://0.0.0.0:0", TcpEndpoint("0.0.0.0", 0), False),
        ("tcp://[2001:db8::1]:65535", TcpEndpoint("2001:db8::1", 65535), False),
        ("tcp://10.0.0.5:7790", TcpEndpoint("10.0.0.5", 7790), False),
        ("tcp://127.0.0.1.example:7790", TcpEndpoint("127.0.0.1.example", 7790), False),
        ("tcp://localhost:7790", TcpEndpoint("localhost", 7790), True),
    ],
)
def test_an_endpoint_says_whether_others_than_this_host_can_be_there(text, endpoint, loopback):
    assert parse_tcp(text) == endpoint
    assert str(endpoint) == text
    assert endpoint.is_loopback == loopback


@pytest.mark.parametrize(
    "text", ["tcp://", "tcp://a", "tcp://a:", "tcp://a:b", "tcp://a:65536", "tcp://a b:1", "udp://a:1"]
)
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"tcp://host:7790"):
        tcp_to_connect(text)
    with pytest.raises(StartupError, match=r"tcp://10\.0\.0\.5:7790"):
        tcp_to_bind(text, "--remote-endpoint")


def test_a_service_listens_beyond_its_host_with_keys_or_where_it_is_told_that_it_may_go_without(pair, tmp_path):
    outside = ("--remote-endpoint", "tcp://0.0.0.0:7790")
    with pytest.raises(StartupError, match="--allow-plain-remote"):
        decide(*outside)
    assert decide(*outside, "--allow-plain-remote").remote(tmp_path).curve_key_file is None
    assert decide("--remote-endpoint", "tcp://127.0.0.1:7790").remote_endpoint.port == 7790
    keys = ("--curve-key-file", pair[0], "--curve-clients-dir", pair[0].parent)
    assert decide(*outside, *keys).remote(tmp_path).curve_key_file == str(pair[0])
    assert decide().remote_endpoint is None


def test_keys_go_together_and_are_checked_before_a_service_starts(pair):
    outside = ("--remote-endpoint", "tcp://0.0.0.0:7790")
    key, clients = ("--curve-key-file", pair[0]), ("--curve-clients-dir", pair[0].parent)
    for wrong, named in (
        ((*outside, *key), "--curve-clients-dir"),
        ((*outside, *clients), "--curve-key-file"),
        ((*outside, *key, *clients, "--allow-plain-remote"), "--allow-plain-remote"),
        ((*outside, "--curve-key-file", pair[1], "--curve-clients-dir", pair[0]), "--curve-key-file"),
        ((*outside, *key, "--curve-clients-dir", pair[0]), "--curve-clients-dir"),
    ):
        with pytest.raises(StartupError, match=named):
            decide(*wrong)


def test_a_backend_goes_without_keys_only_within_its_host_or_where_it_is_told_to(pair):
    outside, inside = TcpEndpoint("10.0.0.5", 7790), TcpEndpoint("127.0.0.1", 7790)
    plain = RemoteKeys.read(None, None, allow_plain=False)
    plain.check(inside)
    with pytest.raises(InvalidRequest, match="needs keys"):
        plain.check(outside)
    RemoteKeys.read(None, None, allow_plain=True).check(outside)
    RemoteKeys.read(pair[0], pair[1], allow_plain=False).check(outside)
    for arguments, allow_plain in (
        ((pair[0], None), False),
        ((None, pair[1]), False),
        (pair, True),
        (pair[::-1], False),
    ):
        with pytest.raises(InvalidRequest):
            RemoteKeys.read(*arguments, allow_plain=allow_plain)


@pytest.mark.parametrize(
    ("endpoint", "arguments"),
    [
        ("tcp://10.0.0.5:7790", {}),
        ("tcp://10.0.0.5", {"allow_plain": True}),
        ("tcp://10.0.0.5:0", {"allow_plain": True}),
        ("ipc:///tmp", {"transport": "tcp"}),
        (None, {"transport": "tcp"}),
        ("tcp://127.0.0.1:7790", {"transport": "udp"}),
        ("tcp://127.0.0.1:7790", {"receive_limit": 0}),
    ],
)
def test_a_backend_is_told_what_is_wrong_before_it_connects(endpoint, arguments):
    with pytest.raises(InvalidRequest):
        AsyncBackend(endpoint, **arguments)


def test_a_service_takes_as_many_clients_as_it_says_and_no_more(pair, monkeypatch):
    monkeypatch.setattr(curve, "MOST_CLIENTS", 1)
    keys = ("--curve-key-file", pair[0], "--curve-clients-dir", pair[0].parent)
    decide("--remote-endpoint", "tcp://127.0.0.1:0", *keys)
    make_pair(pair[0].parent, "engine-1")
    with pytest.raises(StartupError, match=r"--curve-clients-dir.*more than 1"):
        decide("--remote-endpoint", "tcp://127.0.0.1:0", *keys)
