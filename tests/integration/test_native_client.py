"""The native clients and the reader's side: payloads, and the life of leases up to the death of who holds them."""

import asyncio
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, environment, eventually, image, photo, serving, text, user
from transformers import AutoImageProcessor

from mmprep import (
    AsyncClient,
    Backend,
    Client,
    DeadlineExceeded,
    DecodeError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    ServiceUnavailable,
    StaleAddress,
    UnsupportedMedia,
    embedded,
)

#: Long enough that a busy machine does not lose a lease that is renewed, short enough to wait for.
LEASE_SECONDS = 3
CAT = (DATA / "cat.png").read_bytes()
ROCKET = (DATA / "rocket.jpg").read_bytes()

#: Holds one picture in shared memory, and does what each line of its input says.
READER = """
import contextlib, sys
from mmprep import Client, MmprepError

endpoint, name, path, kind = sys.argv[1:]
client = Client(endpoint, backend_id=name)
part = {"type": "image_url", "image_url": {"url": open(path, "rb").read()}}
fields = {"lease_kind": "view"} if kind == "leased as view" else {}
item = client.chat([{"role": "user", "content": [part]}], payload="shm", **fields).items["image"][0]
held = contextlib.ExitStack()
if kind == "view":
    held.enter_context(item.view())
print("holds", flush=True)
for line in sys.stdin:
    try:
        item.materialize()
        print("read", flush=True)
    except MmprepError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "8MiB", "--lease-seconds", LEASE_SECONDS) as running:
        yield running


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(embedded.path())


def raw(data):
    """Return a part with the encoded bytes themselves."""
    return {"type": "image_url", "image_url": {"url": data}}


def reference_pixels(processor, data):
    return np.ascontiguousarray(processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")["pixel_values"])


def drawn(number):
    """Return a PNG that no other number gives, of 150 to 520 pixels a side."""
    side = 150 + 37 * (number % 11)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG", compress_level=0)
    return into.getvalue()


numbers = iter(range(1_000_000))


def flood(client, service):
    """Fill the ring several times over with other pictures."""
    before = service.status()["ring"]["evictions"]
    for _ in range(40):
        client.chat(user(raw(drawn(next(numbers))), text("?")), payload="tensors")
    assert service.status()["ring"]["evictions"] > before


def leases_of(service, name):
    return next((backend["leases"] for backend in service.status()["backends"] if backend["id"] == name), None)


@contextmanager
def reader(service, name, kind):
    command = [sys.executable, "-c", READER, service.endpoint, name, str(DATA / "cat.png"), kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as process:
        try:
            assert process.stdout.readline() == "holds\n"
            yield process
        finally:
            process.kill()


# --- payloads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", ["shm", "tensors"])
def test_raw_bytes_become_tensors_that_equal_transformers(service, processor, payload):
    with Client(service.endpoint) as client:
        result = client.chat(user(raw(CAT), text("and"), raw(ROCKET)), payload=payload)
        over_http = service.render(user(photo("cat.png"), text("and"), photo("rocket.jpg")))
        items = result.items["image"]
        assert result.token_ids == over_http["token_ids"] == result.token_array.tolist()
        assert [item.hash for item in items] == over_http["features"]["mm_hashes"]["image"]
        places = [{"offset": item.offset, "length": item.length} for item in items]
        assert places == over_http["features"]["mm_placeholders"]["image"]
        assert result.max_tokens == over_http["sampling_params"]["max_tokens"]
        assert result.request_id.startswith("chatcmpl-")
        for item, data, element in zip(
            items, (CAT, ROCKET), over_http["features"]["kwargs_data"]["image"], strict=True
        ):
            arrays = item.materialize()
            assert all(np.array_equal(arrays[name], field.array) for name, field in decode_item(element).items())
            normalized = item.materialize(normalize=True)["pixel_values"]
            assert normalized.tobytes() == reference_pixels(processor, data).tobytes()
            arrays["pixel_values"][:] = 0  # a private copy
            assert item.materialize()["pixel_values"].any()
            assert (item.address is not None) == (payload == "shm")
            assert {spec.name for spec in item.fields} == {"pixel_values", "image_grid_thw"}


def test_without_a_payload_there_are_ranges_and_no_tensors(service):
    with Client(service.endpoint) as client:
        result = client.chat(user(raw(CAT), text("?")), payload="none", return_prompt_text=True)
        (item,) = result.items["image"]
        assert (item.is_embed, item.address) == (None, None)
        pad = result.token_ids[item.offset]
        assert result.token_ids[item.offset : item.offset + item.length] == [pad] * item.length
        unexpanded = [*result.token_ids[: item.offset], pad, *result.token_ids[item.offset + item.length :]]
        assert result.unexpanded_token_ids == unexpanded
        assert "<|image_pad|>" in result.prompt_text
        with pytest.raises(InvalidRequest, match="no tensors"):
            item.materialize()


def test_completions_tokenize_and_detokenize_answer_as_over_http(service):
    with Client(service.endpoint) as client:
        (answer,) = client.completions("Once upon a time")
        tokens = client.tokenize(messages=user(raw(CAT), text("?")))["tokens"]
        assert tokens == service.post("/tokenize", {"messages": user(photo("cat.png"), text("?"))}).json["tokens"]
        assert client.detokenize(answer["token_ids"]) == "Once upon a time"


def test_errors_are_of_the_tree_and_name_the_place(service):
    with Client(service.endpoint) as client:
        for parts, kind, param in (
            ([text("?"), raw(ROCKET[:9000])], DecodeError, "messages[0].content[1].image_url"),
            ([raw(b"no picture")], UnsupportedMedia, "messages[0].content[0].image_url"),
            ([{"type": "audio_url", "audio_url": "http://127.0.0.1/"}], InvalidRequest, "messages[0].content[0].type"),
        ):
            for payload in ("shm", "tensors", "none"):
                if kind is DecodeError and payload == "none":
                    continue  # a plan needs only the header
                with pytest.raises(kind) as caught:
                    client.chat(user(*parts), payload=payload)
                assert (caught.value.param, caught.value.retryable) == (param, False)
        with pytest.raises(NotFound) as caught:
            client.chat(user(text("?")), model="other")
        assert (caught.value.param, caught.value.code) == ("model", 404)
        for wrong in ({"max_tokens": np.int64(3)}, {"user": "\ud800"}):
            with pytest.raises(InvalidRequest, match="cannot be sent as JSON"):
                client.chat(user(text("?")), **wrong)
        assert client.chat(user(raw(CAT))).items["image"], "the client goes on"


def test_an_asynchronous_client_does_the_same_and_many_things_at_once(service, processor):
    async def main():
        async with AsyncClient(service.endpoint) as client:
            pictures = [drawn(1000 + number) for number in range(4)]
            results = await asyncio.gather(
                *(
                    client.chat(user(raw(data)), payload=kind)
                    for data in pictures
                    for kind in ("tensors", "shm", "none")
                )
            )
            for index, data in enumerate(pictures):
                inline, shared, none = (result.items["image"][0] for result in results[3 * index : 3 * index + 3])
                assert inline.hash == shared.hash == none.hash
                expected = reference_pixels(processor, data).tobytes()
                assert inline.materialize(normalize=True)["pixel_values"].tobytes() == expected
                assert shared.materialize(normalize=True)["pixel_values"].tobytes() == expected
                async with shared.view() as arrays:
                    assert np.array_equal(arrays["pixel_values"], inline.materialize()["pixel_values"])
                with pytest.raises(InvalidRequest, match="async with"), shared.view():
                    pass
            with pytest.raises(DeadlineExceeded):
                await client.chat(user(raw(drawn(2000))), timeout=0.001)
            assert (await client.tokenize(prompt="a"))["count"] == 1

    asyncio.run(main())
    service.quiet()


def test_no_service_is_told_as_such(tmp_path):
    for endpoint in (f"ipc://{tmp_path}", f"ipc://{tmp_path}/none", tmp_path):
        with pytest.raises(ServiceUnavailable, match="mmprep serve"):
            Client(endpoint)
    for wrong in (5, b"ipc:///run", "run", "http://127.0.0.1:8790"):
        for kind in (Client, Backend):
            with pytest.raises(InvalidRequest, match="runtime directory"):
                kind(wrong)


def test_a_closed_client_says_so(service):
    client = Client(service.endpoint)
    item = client.chat(user(raw(CAT)), payload="shm").items["image"][0]
    client.close()
    with pytest.raises(InvalidRequest, match="closed"):
        item.materialize()
    with pytest.raises(InvalidRequest, match="closed"), item.view():
        pass
    with pytest.raises(InvalidRequest, match="client or backend is closed; make a new one"):
        client.chat(user(raw(CAT)))
    item.release()
    client = Client(service.endpoint)
    item = client.chat(user(raw(CAT))).items["image"][0]
    with item.view() as arrays:
        client.close()
        assert arrays["pixel_values"].any()
    service.quiet()


def cancelled(service):
    return service.metrics().get('mmprep_requests_total{outcome="cancelled",path="native/chat"}', 0)


def test_closing_a_client_ends_the_work_for_its_calls(service):
    before = cancelled(service)
    client = Client(service.endpoint)
    with service.standing_still(), ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(client.chat, user(raw(drawn(next(numbers)))), payload="tensors") for _ in range(4)]
        eventually(lambda: service.under_way() == 4, "the calls' start")
        client.close()
        for call in calls:
            with pytest.raises(InvalidRequest, match="closed"):
                call.result()
        eventually(lambda: service.under_way() == 0, "the end of the calls")
    assert cancelled(service) == before + 4


def test_closing_an_asynchronous_client_ends_the_work_for_its_calls(service):
    before = cancelled(service)

    async def main():
        client = AsyncClient(service.endpoint)
        await client.open()
        calls = [asyncio.create_task(client.chat(user(raw(drawn(next(numbers)))), payload="tensors")) for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: service.under_way() == 4, "the calls' start")
        await client.close()
        assert all(isinstance(end, InvalidRequest) for end in await asyncio.gather(*calls, return_exceptions=True))

    with service.standing_still():
        asyncio.run(main())
        eventually(lambda: service.under_way() == 0, "the end of the calls")
    assert cancelled(service) == before + 4


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_view_is_read_only_and_keeps_its_content_while_the_ring_is_flooded(service, processor):
    with Client(service.endpoint, backend_id="viewer") as client, Client(service.endpoint) as other:
        item = client.chat(user(raw(CAT)), payload="shm").items["image"][0]
        expected = item.materialize()
        with item.view() as arrays:
            for array in arrays.values():
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0
            flood(other, service)
            assert item.address.length <= service.status()["ring"]["leased"] < item.address.length + 64
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
            assert (
                item.materialize(normalize=True)["pixel_values"].tobytes() == reference_pixels(processor, CAT).tobytes()
            )


def test_a_renewed_copy_lease_outlives_its_time_and_a_released_item_can_be_evicted(service):
    with Client(service.endpoint, backend_id="keeper") as client, Client(service.endpoint) as other:
        item = client.chat(user(raw(CAT)), payload="shm").items["image"][0]
        renewals = LEASE_SECONDS * 2
        started = os.times().elapsed
        while os.times().elapsed < started + renewals:
            flood(other, service)
        item.materialize()
        assert leases_of(service, "keeper") == 1
        item.release()
        eventually(lambda: leases_of(service, "keeper") == 0, "the end of the lease")
        flood(other, service)
        with pytest.raises((StaleAddress, LeaseLost)):
            item.materialize()
        again = client.chat(user(raw(CAT)), payload="shm").items["image"][0]
        assert not again.cached
        assert again.hash == item.hash


def test_closing_a_client_ends_its_leases(service):
    client = Client(service.endpoint, backend_id="leaver")
    result = client.chat(user(raw(CAT), raw(ROCKET)), payload="shm")
    assert leases_of(service, "leaver") == 2
    client.close()
    eventually(lambda: not leases_of(service, "leaver"), "the end of the leases")
    assert len(result.items["image"]) == 2
    service.quiet()


def test_dropping_a_result_ends_its_leases(service):
    with Client(service.endpoint, backend_id="dropper") as client:
        result = client.chat(user(raw(CAT), raw(ROCKET)), payload="shm")
        assert leases_of(service, "dropper") == 2
        del result
        eventually(lambda: leases_of(service, "dropper") == 0, "the end of the leases")


def test_a_copy_lease_of_a_stopped_process_runs_out_and_the_process_is_told(service):
    with reader(service, "sleeper", "copy") as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "read\n"
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: leases_of(service, "sleeper") == 0, "the end of the lease")
        assert service.metrics()["mmprep_leases_revoked_total"] >= 1
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "LeaseLost\n"


def test_a_view_of_a_stopped_process_holds_beyond_its_time_and_ends_with_the_process(service):
    with reader(service, "viewer", "view") as process:
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: service.metrics()["mmprep_leases_overdue"] == 1, "the lease is overdue")
        with Client(service.endpoint) as other:
            flood(other, service)
        assert leases_of(service, "viewer") == 1
        process.kill()
        eventually(lambda: not leases_of(service, "viewer"), "the end of the lease")
    service.quiet()


def test_a_lease_that_was_asked_for_as_a_view_is_one_before_anything_is_viewed(service):
    with reader(service, "viewer", "leased as view") as process:
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: service.metrics()["mmprep_leases_overdue"] == 1, "the lease is overdue")
        assert leases_of(service, "viewer") == 1
        process.kill()
        eventually(lambda: not leases_of(service, "viewer"), "the end of the lease")
    with Client(service.endpoint) as client, pytest.raises(InvalidRequest) as refused:
        client.chat(user(raw(CAT)), payload="shm", lease_kind="loan")
    assert refused.value.param == "lease_kind"
    service.quiet()


@pytest.mark.parametrize("kind", ["copy", "view"])
def test_the_leases_of_a_killed_process_are_gone(service, kind):
    with reader(service, "victim", kind) as process:
        assert leases_of(service, "victim") == 1
        process.kill()
        process.wait()
        eventually(lambda: leases_of(service, "victim") is None, "the backend is gone")
    service.quiet()


# --- backends ---------------------------------------------------------------------------------------------------------


def addressed(service, backend, data=CAT):
    answer = service.render(user(image(data), text("?")), mm_payload="shm", backend_id=backend.id)
    return answer["features"]["mm_addresses"]["image"][0]


def test_a_backend_opens_acquires_renews_and_releases_what_http_leased_to_it(service, processor):
    expected = reference_pixels(processor, CAT).tobytes()
    with Backend(service.endpoint, id="engine-0") as backend:
        address = addressed(service, backend)
        assert leases_of(service, "engine-0") == 1
        item = backend.open(address)
        assert item.materialize(normalize=True)["pixel_values"].tobytes() == expected
        with item.view() as arrays:
            assert arrays["image_grid_thw"].tolist() == item.materialize()["image_grid_thw"].tolist()
        assert backend.renew(address) == [True]
        with pytest.raises(InvalidRequest, match='"copy" or "view"'):
            backend.acquire(address, kind="loan")
        unleased = {name: value for name, value in address.items() if not name.startswith("lease")}
        second = backend.acquire(unleased)
        third = backend.open(unleased)
        viewed = backend.acquire(unleased, kind="view")
        assert leases_of(service, "engine-0") == 4
        assert all(one.materialize()["pixel_values"].any() for one in (second, third, viewed))
        for one in (item, second, third, viewed):
            one.release()
        eventually(lambda: leases_of(service, "engine-0") == 0, "the end of the leases")
        assert backend.renew(address) == [False]
        address = addressed(service, backend)
        backend.release(address)
        eventually(lambda: leases_of(service, "engine-0") == 0, "the end of the lease")
    assert leases_of(service, "engine-0") in {None, 0}


def test_releasing_an_address_does_not_take_its_memory_from_who_reads_it(service):
    with Backend(service.endpoint, id="engine-6") as backend:
        address = addressed(service, backend)
        item, other = backend.open(address), backend.acquire(address)
        with item.view() as arrays:
            before = arrays["pixel_values"].copy()
            backend.release(address)  # by somebody to whom it came, too
            other.release()
            eventually(lambda: leases_of(service, "engine-6") == 1, "the end of the other lease")
            assert backend.renew(address) == [True]
            np.testing.assert_array_equal(arrays["pixel_values"], before)
        item.release()
        eventually(lambda: leases_of(service, "engine-6") == 0, "the end of the lease")
        copied = backend.open(address := addressed(service, backend))
        backend.release(address)
        eventually(lambda: leases_of(service, "engine-6") == 0, "the end of the copy's lease")
        with pytest.raises(LeaseLost):
            copied.materialize()


def test_http_callers_renew_and_release_leases_by_the_backends_name(service):
    with Backend(service.endpoint, id="engine-1") as backend:
        lease = addressed(service, backend)["lease"]
        request = {"backend_id": "engine-1", "leases": [lease]}
        assert service.post("/leases/renew", request).json == {"lost": [], "lease_seconds": LEASE_SECONDS}
        other = {"backend_id": "engine-2", "leases": [lease]}
        assert service.post("/leases/renew", other).json["lost"] == [lease]
        assert service.post("/leases/release", other).status == 200
        assert leases_of(service, "engine-1") == 1, "nobody ends another's lease"
        assert service.post("/leases/release", request).json == {"released": True}
        eventually(lambda: leases_of(service, "engine-1") == 0, "the end of the lease")
        assert service.post("/leases/renew", request).json["lost"] == [lease]


def test_an_address_that_is_opened_again_takes_a_lease_of_its_own(service):
    with Backend(service.endpoint, id="engine-2") as backend:
        address = addressed(service, backend)
        first, second = backend.open(address), backend.open(address)
        assert len({one.address.lease for one in (first, second)}) == 2
        assert backend.renew(first.address, second.address) == [True, True]
        with second.view() as arrays:
            with first.view():
                pass
            first.release()
            eventually(lambda: leases_of(service, "engine-2") == 1, "the end of the first lease")
            assert arrays["pixel_values"].any()
        second.release()
        eventually(lambda: leases_of(service, "engine-2") == 0, "the end of the second lease")
        third = backend.open(address)
        assert third.materialize()["pixel_values"].any()
        assert leases_of(service, "engine-2") == 1


@pytest.mark.parametrize("kind", ["copy", "view"])
def test_what_a_caller_gives_back_stays_with_the_backend_that_has_opened_it(service, processor, kind):
    expected = reference_pixels(processor, CAT).tobytes()
    with Backend(service.endpoint, id="engine-3") as backend, Client(service.endpoint) as other:
        answer = service.render(user(image(CAT, "png")), mm_payload="shm", backend_id="engine-3", lease_kind=kind)
        address = answer["features"]["mm_addresses"]["image"][0]
        released = {"backend_id": "engine-3", "leases": [address["lease"]]}
        item = backend.open(address)
        assert service.post("/leases/release", released).json == {"released": True}
        with item.view() as arrays:
            flood(other, service)
            assert item.materialize(normalize=True)["pixel_values"].tobytes() == expected
            assert arrays["pixel_values"].any()
        assert leases_of(service, "engine-3") == 1
        item.release()
        eventually(lambda: leases_of(service, "engine-3") == 0, "the end of the lease")
        assert service.post("/leases/release", released).json == {"released": True}


@pytest.mark.parametrize("kind", ["copy", "view"])
def test_an_address_that_a_caller_gave_back_before_it_was_opened_is_leased_anew(service, kind):
    with Backend(service.endpoint, id="engine-4") as backend:
        answer = service.render(user(image(CAT, "png")), mm_payload="shm", backend_id="engine-4", lease_kind=kind)
        address = answer["features"]["mm_addresses"]["image"][0]
        service.post("/leases/release", {"backend_id": "engine-4", "leases": [address["lease"]]})
        eventually(lambda: leases_of(service, "engine-4") == 0, "the end of the lease")
        item = backend.open(address)
        assert item.address.lease != address["lease"]
        assert leases_of(service, "engine-4") == 1
        with item.view() as arrays:
            assert arrays["pixel_values"].any()


def test_a_lease_that_is_not_the_addresses_own_is_not_relied_on(service):
    """An address has the lease of another one, is said to be a view and is a copy, or has a damaged lease."""
    with Backend(service.endpoint, id="engine-5") as backend:
        shm = {"mm_payload": "shm", "backend_id": "engine-5"}
        first, second = (
            service.render(user(image(data, kind)), **shm)["features"]["mm_addresses"]["image"][0]
            for data, kind in ((CAT, "png"), (ROCKET, "jpeg"))
        )
        damaged = first["lease"][:-1] + ("0" if first["lease"][-1] != "0" else "1")
        for wrong in ({"lease": second["lease"]}, {"lease_kind": "view"}, {"lease": damaged}, {"lease": "0" * 32}):
            item = backend.open(first | wrong)
            assert item.address.lease not in {first["lease"], (first | wrong)["lease"]}
            assert backend.renew(item.address) == [True]
            item.release()
        assert backend.open(first).address.lease == first["lease"]
        assert backend.open(second).address.lease == second["lease"]


def test_an_address_without_a_lease_is_stale_once_its_content_was_evicted(service):
    with Backend(service.endpoint) as backend, Client(service.endpoint) as other:
        address = addressed(service, backend)
        backend.release(address)
        eventually(lambda: service.status()["ring"]["leased"] == 0, "the end of the lease")
        for _ in range(2):
            flood(other, service)
        unleased = {name: value for name, value in address.items() if not name.startswith("lease")}
        with pytest.raises(StaleAddress) as caught:
            backend.acquire(unleased)
        assert caught.value.retryable


@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (lambda address: {"slot": address["slot"] + 1}, StaleAddress),
        (lambda address: {"generation": address["generation"] + 1}, StaleAddress),
        (lambda address: {"generation": address["generation"] - 1}, StaleAddress),
        (lambda _: {"generation": 0}, StaleAddress),
        (lambda address: {"offset": address["offset"] + 64}, StaleAddress),
        (lambda address: {"length": address["length"] - 64, "metadata_length": 8, "fields": []}, StaleAddress),
        (lambda _: {"epoch": "0" * 32}, StaleAddress),
        (lambda address: {"segment": address["segment"] + "0"}, StaleAddress),
        (lambda _: {"slot": 2**40}, InvalidRequest),
        (lambda _: {"offset": 0}, InvalidRequest),
        (lambda _: {"offset": 2**47}, InvalidRequest),
        (lambda _: {"length": 2**47}, InvalidRequest),
        (lambda address: {"metadata_length": address["length"] + 1}, InvalidRequest),
        (lambda _: {"metadata_length": 3}, InvalidRequest),
        (lambda _: {"offset": -1}, InvalidRequest),
        (lambda _: {"generation": 2**70}, InvalidRequest),
        (lambda _: {"epoch": "x"}, InvalidRequest),
        (lambda _: {"extra": 1}, InvalidRequest),
        (lambda address: {"fields": [{**address["fields"][0], "shape": [2**40, 2**40]}]}, InvalidRequest),
        (lambda address: {"fields": [{**address["fields"][0], "dtype": "object"}]}, InvalidRequest),
    ],
)
def test_a_forged_address_is_an_error_and_never_somebody_elses_pixels(service, forge, error):
    with Backend(service.endpoint) as backend:
        address = addressed(service, backend)
        unleased = {name: value for name, value in address.items() if not name.startswith("lease")}
        forged = {**unleased, **forge(address)}
        for attempt in (backend.open, backend.acquire):
            with pytest.raises(error):
                attempt(forged)
        assert backend.open(address).materialize()["pixel_values"].any(), "the true one still works"
        with pytest.raises(InvalidRequest):
            backend.open({})


def test_an_id_of_a_living_backend_is_refused_and_free_again_after_it(service):
    with Backend(service.endpoint, id="only-one") as first:
        with pytest.raises(InvalidRequest, match="only-one") as caught:
            Backend(service.endpoint, id="only-one")
        assert caught.value.param == "backend_id"
        with Client(service.endpoint, backend_id="only-one") as client:
            assert client.chat(user(raw(CAT)), payload="none").items, "what needs no lease needs no id"
            with pytest.raises(InvalidRequest, match="only-one"):
                client.chat(user(raw(CAT)), payload="shm")
        assert addressed(service, first)
    with reader(service, "only-one", "copy"), pytest.raises(InvalidRequest, match="only-one"):
        Backend(service.endpoint, id="only-one")
    with Backend(service.endpoint, id="only-one") as again:
        assert addressed(service, again)
    with pytest.raises(InvalidRequest, match="A-Z"):
        Backend(service.endpoint, id="../escape")


def test_afterwards_nothing_is_held(service):
    status = service.quiet()
    assert status["backends"] == []
