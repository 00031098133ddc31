"""What an operator asks of a service over HTTP: whatever frontend is asked, all of it is reset; what is held stays readable."""

from pathlib import Path

import numpy as np
import pytest
from tests.integration.media_host import media_host
from tests.integration.service import DATA, eventually, photo, serving, text, user

from mmprep import Client, NotFound

KEY, ADMIN = "sk-client-0123456789abcdef", "sk-admin-0123456789abcdef"
AS_CLIENT, AS_ADMIN = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def host():
    with media_host() as server:
        yield server


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resets")
    keys, admins = directory / "keys", directory / "admins"
    keys.write_text(KEY)
    admins.write_text(ADMIN)
    options = ("--api-key-file", keys, "--admin-key-file", admins, "--media-cache-dir", directory / "media")
    with serving("--frontends", 2, "--cache-size", "32MiB", "--allow-private-networks", *options) as service:
        yield service


def chat(service, *parts, **fields):
    answer = service.post("/v1/chat/completions/render", {"messages": user(*parts), **fields}, **AS_CLIENT)
    assert answer.status == 200, answer.body
    return answer.json


def hits(service):
    return service.status()["metrics"].get("mmprep_mm_cache_hits_total", 0)


def resets(service, cache):
    return service.metrics().get(f'mmprep_resets_total{{cache="{cache}"}}', 0)


@pytest.mark.parametrize("path", ["/reset_mm_cache", "/reset_media_cache"])
def test_a_reset_needs_an_admin_key(service, path):
    for headers in ({}, AS_CLIENT):
        refused = service.post(path, b"", **headers)
        assert refused.status == 401
        assert refused.error["type"] == "AuthenticationError"


def test_a_reset_mm_cache_has_no_hit_no_name_and_what_is_held_is_still_read(service):
    picture = (DATA / "cat.png").read_bytes()
    parts = [{"type": "image_url", "image_url": {"url": picture}}]
    chat(service, {**photo("cat.png"), "uuid": "cat"})
    with Client(service.endpoint) as client:
        held = client.chat(user(*parts)).items["image"][0]
        before = held.materialize()
        answer = service.post("/reset_mm_cache", b"", **AS_ADMIN)
        assert answer.status == 200
        assert answer.json["entries"] == 2  # a native client has a cache of its own
        after = held.materialize()
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        held.release()
        known = hits(service)
        named = {"messages": user({"type": "image_url", "uuid": "cat"}), "mm_payload": "none"}
        gone = service.post("/v1/chat/completions/render", named, **AS_CLIENT)
        assert gone.status == 404
        assert gone.error["param"] == "messages[0].content[0].uuid"
        chat(service, photo("cat.png"))
        assert hits(service) == known
        assert client.reset_mm_cache()["entries"] == 1
        assert client.reset_mm_cache() == {"entries": 0, "bytes": 0}
    assert resets(service, "mm") == 3


def test_a_reset_media_cache_asks_the_host_again_whatever_frontend_is_asked(service, host):
    url = f"{host.url}/reset.png"
    part = {"type": "image_url", "image_url": {"url": url}}

    bodies = Path(service.status()["media_cache"]["directory"]) / "mmprep-media-1" / "bodies"

    def kept():
        return [path for path in bodies.iterdir() if path.suffix != ".part"]

    for round_number in (1, 2):
        chat(service, text("?"), part)
        eventually(kept, "the medium on the disk")
        for _ in range(4):
            chat(service, text("?"), part)
        assert [tag for path, tag in host.asked if path == "/reset.png"] == [None] * round_number
        with Client(service.endpoint) as client:
            assert client.reset_media_cache()["entries"] == 1
    answer = service.post("/reset_media_cache", b"", **AS_ADMIN)
    assert answer.json == {"entries": 0, "bytes": 0}
    assert resets(service, "media") == 3


def test_a_service_that_was_not_told_to_inject_does_not(service):
    refused = service.post("/inject", b"\x80", **AS_ADMIN)
    assert (refused.status, refused.error["type"]) == (404, "NotFoundError")
    assert "--enable-injection" in refused.error["message"]
    with Client(service.endpoint) as client, pytest.raises(NotFound, match="--enable-injection"):
        client.inject("name", {"pixel_values": np.zeros((4, 1176), np.uint8)}, expansion=[1])
