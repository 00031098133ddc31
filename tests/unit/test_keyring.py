"""Keys: what a file may hold, who a key belongs to, and that none is shown."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmprep.api_keys import ApiKey, digest_of, read_keys
from mmprep.errors import AuthenticationError, StartupError
from mmprep_frontend.caller import ANONYMOUS
from mmprep_frontend.http.keyring import Keyring

KEY = "sk-0123456789abcdef"
OTHER = "sk-fedcba9876543210"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_a_file_has_one_key_a_line_with_or_without_a_name(file):
    named, unnamed = read_keys(file(f"# for the team\n\nteam-a {KEY}\n  {OTHER}\n"), "--api-key-file")
    assert named == ApiKey("team-a", hashlib.sha256(KEY.encode()).hexdigest())
    assert unnamed.digest == hashlib.sha256(OTHER.encode()).hexdigest()
    assert unnamed.principal == f"key:{unnamed.digest[:16]}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("short\n", "line 1"),
        (f"team-a {KEY}\nteam b {OTHER}\n", "line 2"),
        (f"team/a {KEY}\n", "name"),
        (f"{KEY}é\n", "line 1"),
        (f"a {KEY}\nb {KEY}\n", "twice"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_option_and_no_key(file, text, why):
    with pytest.raises(StartupError) as caught:
        read_keys(file(text), "--api-key-file")
    assert "--api-key-file" in caught.value.message
    assert why in caught.value.message
    assert KEY not in caught.value.message
    assert OTHER not in caught.value.message


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StartupError, match=r"--admin-key-file.*cannot be read"):
        read_keys(tmp_path / "none", "--admin-key-file")


def ring(*, keys=(), admins=(), shared=False):
    return Keyring(
        [ApiKey(name, digest_of(key)) for name, key in keys],
        [ApiKey(name, digest_of(key)) for name, key in admins],
        shared=shared,
    )


def test_without_keys_everybody_is_anonymous_and_may_do_everything():
    for need in ("nothing", "key", "admin"):
        assert ring().admit({"Authorization": "Bearer anything"}, need) == ANONYMOUS


def test_an_admin_key_is_good_for_everything_and_a_client_key_is_not():
    both = ring(keys=[("a", KEY)], admins=[("root", OTHER)])
    assert both.admit({"X-Api-Key": OTHER}, "admin") == both.admit({"X-Api-Key": OTHER}, "key") == "root"
    with pytest.raises(AuthenticationError, match="admin key"):
        both.admit({"X-Api-Key": KEY}, "admin")


def test_with_client_keys_alone_nobody_is_an_admin_and_the_error_says_what_is_missing():
    with pytest.raises(AuthenticationError, match="--admin-key-file"):
        ring(keys=[("a", KEY)]).admit({"X-Api-Key": KEY}, "admin")


def test_with_admin_keys_alone_requests_need_none():
    alone = ring(admins=[("root", OTHER)])
    assert alone.admit({}, "key") == ANONYMOUS
    with pytest.raises(AuthenticationError):
        alone.admit({}, "admin")


def test_a_shared_cache_has_one_principal_and_still_needs_a_key():
    shared = ring(keys=[("a", KEY), ("b", OTHER)], shared=True)
    assert shared.admit({"X-Api-Key": KEY}, "key") == shared.admit({"X-Api-Key": OTHER}, "key") == ANONYMOUS
    with pytest.raises(AuthenticationError):
        shared.admit({}, "key")


@given(sent=st.text(max_size=2000))
def test_nothing_but_a_key_is_a_key(sent):
    if sent.strip() == KEY:
        return
    for headers in ({"X-Api-Key": sent}, {"Authorization": f"Bearer {sent}"}, {"Authorization": sent}):
        with pytest.raises(AuthenticationError):
            ring(keys=[("a", KEY)]).admit(headers, "key")
