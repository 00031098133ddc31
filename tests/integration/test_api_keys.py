"""A service with keys: who may ask, and that one client's pictures are not another's."""

import pytest
from tests.integration.service import photo, serving, user

FIRST, SECOND, AGAIN, ADMIN = (f"sk-{name}-0123456789abcdef" for name in ("first", "second", "again", "admin"))


@pytest.fixture
def files(tmp_path):
    keys, admins = tmp_path / "keys", tmp_path / "admins"
    keys.write_text(f"team-a {FIRST}\nteam-b {SECOND}\nteam-a {AGAIN}\n")
    admins.write_text(ADMIN)
    return "--api-key-file", keys, "--admin-key-file", admins


def rendered(service, key):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"messages": user(photo("cat.png")), "mm_payload": "none"}
    return service.post("/v1/chat/completions/render", body, **headers)


def counts(service):
    metrics = service.status()["metrics"]
    return metrics.get("mmprep_mm_cache_queries_total", 0), metrics.get("mmprep_mm_cache_hits_total", 0)


def test_one_client_does_not_find_what_another_has_sent_and_two_keys_of_one_name_are_one_client(files):
    with serving("--frontends", 1, *files) as service:
        assert rendered(service, None).error["type"] == "AuthenticationError"
        hashes = {}
        for key, found in ((FIRST, 0), (FIRST, 1), (SECOND, 1), (AGAIN, 2), (ADMIN, 2)):
            answer = rendered(service, key)
            assert answer.status == 200
            hashes[key] = answer.json["features"]["mm_hashes"]["image"][0]
            assert counts(service)[1] == found
        assert hashes[FIRST] == hashes[AGAIN]
        assert len(set(hashes.values())) == 3


def test_clients_share_the_cache_where_they_are_told_to(files):
    with serving("--frontends", 1, "--share-cache-across-keys", *files) as service:
        assert [rendered(service, key).status for key in (FIRST, SECOND, ADMIN, None)] == [200, 200, 200, 401]
        assert counts(service) == (3, 2)
