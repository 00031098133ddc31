"""Queues with real processes: jobs from both doors, pulled by backends that are killed, stopped, slow, many or wrong."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from tests.integration.service import DATA, decode_item, environment, image, photo, serving, text, user

from mmprep import (
    AsyncBackend,
    AsyncClient,
    Backend,
    Busy,
    Client,
    Conflict,
    InvalidRequest,
    NotFound,
    ServiceUnavailable,
    StaleDelivery,
)

CAT = (DATA / "cat.png").read_bytes()
CHAT = user({"type": "image_url", "image_url": {"url": CAT}}, text("What is it?"))
#: Long enough that a busy machine does not lose a job that somebody works on, short enough to wait for.
JOB_SECONDS = 4

#: Pulls jobs, tells of each, and acknowledges it when it is told to.
CONSUMER = """
import sys
from mmprep import Backend, MmprepError

with Backend(sys.argv[1], queue=sys.argv[2], credits=1) as backend:
    print("pulls", flush=True)
    for job in backend:
        print(job.id, job.attempt, flush=True)
        sys.stdin.readline()
        try:
            job.ack()
            print("acknowledged", flush=True)
        except MmprepError as error:
            print(type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def service():
    options = ("--queues", "declared", "--job-timeout", JOB_SECONDS, "--queue-jobs", 40, "--frontends", 1)
    with serving("--cache-size", "16MiB", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with Client(service.endpoint) as client:
        yield client


@pytest.fixture(scope="module")
def pixels(service):
    """What the service answers about the picture over HTTP."""
    answer = service.render(user(photo("cat.png"), text("What is it?")))
    (element,) = answer["features"]["kwargs_data"]["image"]
    return answer, {name: field.array for name, field in decode_item(element).items()}


@contextmanager
def consumer(service, queue):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", CONSUMER, service.endpoint, queue]
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as process:
        try:
            assert process.stdout.readline() == "pulls\n"
            yield process
        finally:
            process.kill()


def queue_of(service, name):
    return service.status()["queues"][name]


def equal(arrays, expected):
    return arrays.keys() == expected.keys() and all(np.array_equal(arrays[name], expected[name]) for name in expected)


# --- what a job is ----------------------------------------------------------------------------------------------------


def test_a_job_is_what_rendering_answers_with_the_tensors_by_address(service, client, pixels):
    answer, expected = pixels
    with Backend(service.endpoint, queue="engine-0", credits=4) as backend:
        posted = service.chat(user(photo("cat.png"), text("What is it?")), queue="engine-0", temperature=0.5)
        assert posted.status == 202
        ids = [posted.json["request_id"], client.post(CHAT, queue="engine-0", temperature=0.5)]
        assert posted.json == {"request_id": ids[0], "queue": "engine-0"}
        for job_id in ids:
            job = backend.pull()
            assert (job.id, job.queue, job.attempt, job.error) == (job_id, "engine-0", 1, None)
            with job.view() as items:
                (arrays,) = items["image"]
                assert equal(arrays, expected)
                assert not arrays["pixel_values"].flags.writeable
            features = {**answer["features"], "kwargs_data": None, "mm_metadata": None}
            sampling = {**answer["sampling_params"], "temperature": 0.5}
            same = {**answer, "request_id": job_id, "features": features, "sampling_params": sampling}
            assert job.request == same
            assert job.items["image"][0].address is not None
            job.ack()
        service.quiet()
        assert queue_of(service, "engine-0")["jobs"] == {"posted": 2, "delivered": 2, "acked": 2}


def test_a_job_of_remembered_items_is_taken_whether_they_are_still_there_or_not(service, pixels):
    """The second one is posted without asking for its picture first; that of the third has gone meanwhile."""
    named = {**photo("cat.png"), "uuid": "the cat"}

    def counted():
        metrics = service.metrics()
        return [metrics.get(f'mmprep_mm_cache_{name}_total{{modality="image"}}', 0) for name in ("queries", "hits")]

    with Backend(service.endpoint, queue="engine-0", credits=1) as backend:
        for hits, empties in ((1, False), (1, False), (0, True)):
            if empties:
                assert service.post("/reset_mm_cache", {}).status == 200
            before = counted()
            assert service.chat(user(named, text("What is it?")), queue="engine-0").status == 202
            assert [after - then for after, then in zip(counted(), before, strict=True)] == [1, hits]
            job = backend.pull()
            (item,) = job.items["image"]
            assert item.cached == bool(hits)
            with job.view() as items:
                assert equal(items["image"][0], pixels[1])
            job.ack()
        nameless = user({"type": "image_url", "image_url": None, "uuid": "the cat"}, text("What is it?"))
        assert service.render(nameless)["features"]["mm_hashes"]["image"] == [item.hash]


def test_a_job_may_have_no_tensors_and_no_media(service, client):
    with Backend(service.endpoint, queue="engine-0") as backend:
        client.post(CHAT, queue="engine-0", mm_payload="none")
        client.post(user(text("Hi")), queue="engine-0", priority=-1)
        posted = service.post("/v1/responses/render", {"input": "Hi", "queue": "engine-0", "priority": 1})
        jobs = [backend.pull(), backend.pull(), backend.pull()]
        assert [bool(job.items) for job in jobs] == [True, False, False]
        assert posted.json["request_id"] == jobs[2].id
        assert jobs[2].id.startswith("resp_")
        with pytest.raises(InvalidRequest, match="no tensors"), jobs[0].view():
            pass
        assert jobs[0].request["features"]["mm_hashes"]["image"] == [jobs[0].items["image"][0].hash]
        for job in jobs:
            job.ack()


def test_a_completion_is_a_job_of_its_one_prompt(service, client):
    asked = {"prompt": "Once upon a time", "temperature": 0.5, "return_prompt_text": True}
    (answer,) = service.post("/v1/completions/render", asked).json
    path, queued = "/v1/completions/render", {**asked, "queue": "engine-0"}
    with Backend(service.endpoint, queue="engine-0") as backend:
        posts = [service.post(path, queued, Idempotency_Key="story") for _ in range(2)]
        assert [posted.status for posted in posts] == [202, 202]
        ids = [posts[0].json["request_id"], client.post_completion(answer["token_ids"], queue="engine-0", priority=1)]
        assert posts[1].json == posts[0].json == {"request_id": ids[0], "queue": "engine-0"}
        assert all(job_id.startswith("cmpl-") for job_id in ids)
        jobs = [backend.pull(), backend.pull()]
        assert [job.id for job in jobs] == ids
        assert jobs[0].request == {**answer, "request_id": ids[0]}
        assert jobs[1].token_ids == answer["token_ids"]
        for job in jobs:
            assert not job.items
            job.ack()
    for wrong, param in (({"prompt": ["a", "b"]}, "prompt"), ({"prompt": [1] * 40_000}, "prompt")):
        refused = service.post(path, {**wrong, "queue": "declared"})
        assert (refused.status, refused.json["error"]["param"]) == (400, param)
    with pytest.raises(InvalidRequest, match="post_completion"):
        client.completions("Hi", queue="declared")


def test_the_asynchronous_backend_does_the_same(service, pixels):
    async def work():
        async with AsyncClient(service.endpoint) as client, AsyncBackend(service.endpoint, queue="async") as backend:
            posted = [await client.post(CHAT, queue="async") for _ in range(3)]
            got = []
            async for job in backend:
                async with job.view() as items:
                    assert equal(items["image"][0], pixels[1])
                await (job.nack() if job.attempt == 1 and job.id == posted[0] else job.ack())
                got.append((job.id, job.attempt))
                if len(got) == 4:
                    await backend.drain()
            with pytest.raises(InvalidRequest, match="already"):
                await job.release()
            return posted, got

    posted, got = asyncio.run(work())
    assert sorted(got) == sorted([*((job_id, 1) for job_id in posted), (posted[0], 2)])


# --- who gets what ----------------------------------------------------------------------------------------------------


def test_nothing_comes_beyond_the_credits(service, client):
    with Backend(service.endpoint, queue="engine-0", credits=1) as backend:
        ids = [client.post(user(text(f"{number}")), queue="engine-0") for number in range(2)]
        first = backend.pull()
        state = service.status_when(lambda s: s["queues"]["engine-0"]["depth"] == 1, "a job that waits")
        assert state["queues"]["engine-0"]["delivered"] == 1
        assert backend.pull(timeout=0) is None
        first.ack()
        second = backend.pull()
        second.ack()
        assert [first.id, second.id] == ids


def test_jobs_whose_ends_are_not_waited_for_are_done_and_free_their_credits_also_when_the_backend_leaves_at_once(
    service, client
):
    with Backend(service.endpoint, queue="hasty", credits=4) as backend:
        ids = [client.post(CHAT, queue="hasty") for _ in range(9)]
        done = []
        for _ in ids:
            job = backend.pull()
            job.ack(wait=False)
            done.append(job.id)
        with pytest.raises(InvalidRequest, match="already"):
            job.ack(wait=False)
    assert done == ids
    assert queue_of(service, "hasty")["jobs"] == {"posted": 9, "delivered": 9, "acked": 9}
    service.quiet()


def test_threads_that_wait_at_one_backend_get_every_job_once_also_where_others_give_up_waiting(service, client):
    done, lock = [], threading.Lock()

    def work(timeout):
        while len(done) < 30:
            job = backend.pull(timeout)
            if job is not None:
                job.ack()
                with lock:
                    done.append(job.id)
            elif timeout is None:  # it drains
                return

    with Backend(service.endpoint, queue="threads", credits=2) as backend:
        threads = [threading.Thread(target=work, args=(timeout,)) for timeout in (None, None, 0.001, 0.002)]
        for thread in threads:
            thread.start()
        ids = {client.post(user(text("?")), queue="threads") for _ in range(30)}
        for thread in threads[2:]:
            thread.join()
        backend.drain()
        for thread in threads[:2]:
            thread.join()
    assert len(done) == 30
    assert set(done) == ids


def test_many_backends_share_a_queue_and_one_serves_two(service, client):
    done, lock = [], threading.Lock()

    def work(backend):
        for job in backend:
            job.ack()
            with lock:
                done.append((backend.id, job.queue, job.id))

    backends = [Backend(service.endpoint, queue=["left", "right"], credits=1) for _ in range(2)]
    backends.append(Backend(service.endpoint, queue="left", credits=1))
    threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    ids = {client.post(user(text("?")), queue=queue) for _ in range(15) for queue in ("left", "right")}
    service.status_when(
        lambda s: all(s["queues"][q]["jobs"].get("acked") == 15 for q in ("left", "right")), "all jobs done"
    )
    for backend in backends:
        backend.drain()
    for thread in threads:
        thread.join()
    for backend in backends:
        backend.close()
    assert {job_id for *_, job_id in done} == ids
    assert len(done) == 30
    assert {(who, queue) for who, queue, _ in done} == {
        *((backend.id, queue) for backend in backends[:2] for queue in ("left", "right")),
        (backends[2].id, "left"),
    }


def test_a_backend_that_drains_gives_back_what_it_has_not_begun(service, client):
    with Backend(service.endpoint, queue="drained", credits=3) as draining:
        ids = [client.post(user(text(f"{number}")), queue="drained") for number in range(3)]
        first = draining.pull()
        service.status_when(lambda s: s["queues"]["drained"]["delivered"] == 3, "three jobs delivered")
        draining.drain()
        assert list(draining) == []
        with Backend(service.endpoint, queue="drained", credits=3) as other:
            jobs = [other.pull(), other.pull()]
            assert {job.id for job in jobs} == set(ids) - {first.id}
            assert all(job.attempt == 2 for job in jobs)
            first.ack()
            for job in jobs:
                job.ack()
        assert queue_of(service, "drained")["dead_letters"] == []


# --- deaths -----------------------------------------------------------------------------------------------------------


def test_a_job_whose_consumer_is_killed_is_delivered_to_another(service, client, pixels):
    with consumer(service, "deadly") as process:
        job_id = client.post(CHAT, queue="deadly")
        assert process.stdout.readline() == f"{job_id} 1\n"
        with Backend(service.endpoint, queue="deadly") as backend:
            process.kill()
            job = backend.pull()
            assert (job.id, job.attempt) == (job_id, 2)
            with job.view() as items:
                assert equal(items["image"][0], pixels[1])
            job.ack()


def test_a_consumer_that_does_not_read_loses_its_job_and_gets_no_more(service, client):
    with consumer(service, "silent") as process:
        job_id = client.post(user(text("Hi")), queue="silent")
        assert process.stdout.readline() == f"{job_id} 1\n"
        process.send_signal(signal.SIGSTOP)
        with Backend(service.endpoint, queue="silent", credits=1) as backend:
            job = backend.pull()
            assert (job.id, job.attempt) == (job_id, 2)
            waiting = client.post(user(text("more")), queue="silent")
            assert queue_of(service, "silent")["depth"] == 1, "a job went to a process that does not read"
            process.send_signal(signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "StaleDelivery\n"
            assert process.stdout.readline() == f"{waiting} 1\n", "one that speaks again gets jobs again"
            job.ack()


def test_a_job_that_fails_again_and_again_becomes_a_dead_letter(service, client):
    with Backend(service.endpoint, queue="poisoned") as backend:
        job_id = client.post(user(text("poison")), queue="poisoned")
        for attempt in (1, 2, 3):
            job = backend.pull()
            assert (job.id, job.attempt) == (job_id, attempt)
            job.nack("it does not agree with me")
        assert backend.pull(timeout=0) is None
    (letter,) = queue_of(service, "poisoned")["dead_letters"]
    assert (letter["request_id"], letter["attempts"], letter["why"]) == (job_id, 3, "it does not agree with me")
    assert letter["producer"].startswith("client:")
    assert service.metrics()['mmprep_queue_jobs_total{event="dead",queue="poisoned"}'] == 1


def test_a_job_that_nobody_takes_in_its_time_becomes_a_dead_letter(service, client):
    job_id = client.post(user(text("?")), queue="declared", deadline_ms=200)
    state = service.status_when(lambda s: s["queues"]["declared"]["dead_letters"], "a dead letter")
    assert state["queues"]["declared"]["dead_letters"][0]["request_id"] == job_id
    assert state["queues"]["declared"]["dead_letters"][0]["attempts"] == 0


def test_jobs_outlive_the_frontend_that_posted_them(service):
    with Backend(service.endpoint, queue="engine-0", credits=1) as backend:
        posted = [service.chat(user(photo("cat.png"), text(f"{n}")), queue="engine-0").json for n in range(2)]
        first = backend.pull()
        (pid,) = service.pids()["frontend"]
        os.kill(pid, signal.SIGKILL)
        service.status_when(lambda s: all(one["pid"] != pid for one in s["frontends"]), "the frontend's end")
        first.ack()
        second = backend.pull()
        assert [first.id, second.id] == [one["request_id"] for one in posted]
        with second.view() as items:
            assert items["image"]
        second.ack()


def test_jobs_outlive_the_writer_those_that_wait_and_those_that_are_delivered(service, client, pixels):
    service.status_when(lambda s: s["frontends"] and s["frontends"][0]["ready"], "a frontend")
    with Backend(service.endpoint, queue="engine-0", credits=2) as backend:
        ids = [client.post(CHAT, queue="engine-0") for _ in range(4)]
        held = [backend.pull(), backend.pull()]
        (pid,) = service.pids()["writer"]
        os.kill(pid, signal.SIGKILL)
        for job in held:
            with job.view() as items:
                assert equal(items["image"][0], pixels[1])
            job.ack()  # the next writer hears of it from the backend, and of the others from the frontend
        later = [backend.pull(), backend.pull()]
        for job in later:
            with job.view() as items:
                assert equal(items["image"][0], pixels[1])
            job.ack()
        assert sorted(job.id for job in held + later) == sorted(ids)
        assert backend.pull(timeout=0.2) is None
    assert queue_of(service, "engine-0")["jobs"]["acked"] >= 2
    service.quiet()


# --- wrong words ------------------------------------------------------------------------------------------------------


def test_the_next_writer_is_told_of_jobs_whose_ends_were_not_waited_for(service, client):
    with Backend(service.endpoint, queue="heard", credits=4) as backend:
        client.post(user(text("?")), queue="heard")
        job = backend.pull()
        pid = service.pids()["writer"][0]
        os.kill(pid, signal.SIGSTOP)
        job.ack(wait=False)
        os.kill(pid, signal.SIGKILL)
        following = client.post(user(text("!")), queue="heard")
        job = backend.pull()
        assert (job.id, job.attempt) == (following, 1)
        service.status_when(lambda s: s["queues"]["heard"]["delivered"] == 1, "the word that the first job is done")
        job.ack()
        assert queue_of(service, "heard")["depth"] == 0


def test_a_request_is_posted_once_under_its_key(service, client):
    body = {"messages": user(text("once")), "queue": "declared"}
    path = "/v1/chat/completions/render"
    answers = [service.post(path, body, Idempotency_Key="one") for _ in range(2)]
    assert [answer.status for answer in answers] == [202, 202]
    assert answers[0].json == answers[1].json
    other = service.post(path, {**body, "messages": user(text("twice"))}, Idempotency_Key="one")
    assert (other.status, other.json["error"]["type"], other.json["error"]["code"]) == (409, "BadRequestError", 409)
    assert client.post(user(text("once")), queue="declared", idempotency_key="one") != answers[0].json["request_id"]
    with pytest.raises(Conflict):
        client.post(user(text("twice")), queue="declared", idempotency_key="one")
    assert service.post(path, body, Idempotency_Key="é").status == 400
    with Backend(service.endpoint, queue="declared") as backend:
        jobs = [backend.pull(), backend.pull()]
        assert backend.pull(timeout=0) is None
        for job in jobs:
            job.ack()
    assert service.post(path, body, Idempotency_Key="one").json == answers[0].json, "also after its job has ended"
    assert queue_of(service, "declared")["depth"] == 0


def test_what_cannot_be_queued_is_refused_by_name(service, client):
    def refusal(part=None, **fields):
        answer = service.chat(user(part or text("?")), **fields)
        return answer.status, answer.json["error"]["param"]

    with pytest.raises(NotFound, match="no backend pulls") as caught:
        client.post(user(text("?")), queue="nowhere")
    assert caught.value.param == "queue"
    assert refusal(queue="nowhere") == (404, "queue")
    assert refusal(queue="media") == (404, "queue")
    assert refusal(queue="no/name") == (400, "queue")
    assert refusal(queue="declared", mm_payload="tensors") == (400, "mm_payload")
    assert refusal(queue="declared", backend_id="engine") == (400, "backend_id")
    assert refusal(queue="declared", lease_kind="copy") == (400, "lease_kind")
    assert refusal(image(b"no picture"), queue="declared") == (415, "messages[0].content[0].image_url")
    with pytest.raises(InvalidRequest, match="post"):
        client.chat(user(text("?")), queue="declared")
    for wrong in ({"queue": "media"}, {"queue": "a/b"}, {"queue": []}, {"queue": "q", "credits": 0}):
        with pytest.raises((InvalidRequest, ServiceUnavailable)):
            Backend(service.endpoint, **wrong)
    with Backend(service.endpoint) as backend, pytest.raises(InvalidRequest, match="no queue"):
        next(backend)
    for key in ("", "k" * 256):
        with pytest.raises(InvalidRequest, match="1 to 255") as caught:
            client.post(user(text("?")), queue="declared", idempotency_key=key)
        assert caught.value.param == "idempotency_key"


def test_a_full_queue_refuses_what_is_too_much_and_one_producer_leaves_room_for_others(service, client):
    with Backend(service.endpoint, queue="narrow", credits=40):
        pass  # the queue stays for a while
    for _ in range(30):
        client.post(user(text("?")), queue="narrow")
    with pytest.raises(Busy) as caught:
        client.post(user(text("?")), queue="narrow")
    assert caught.value.param == "queue"
    assert (
        caught.value.message == "your jobs take the most that one producer may have of queue 'narrow'; post again later"
    )
    answer = service.chat(user(text("?")), queue="narrow")
    assert answer.status == 202
    with Backend(service.endpoint, queue="narrow", credits=40) as backend:
        for _ in range(31):
            backend.pull().ack()


def test_a_job_that_was_given_up_can_not_be_acknowledged_any_more(service, client):
    with Backend(service.endpoint, queue="late", credits=1) as backend:
        client.post(user(text("?")), queue="late")
        job = backend.pull()
        service.status_when(lambda s: s["queues"]["late"]["depth"] == 1, "a job that came back")
        for _ in range(2):
            with pytest.raises(StaleDelivery):
                job.ack()
        again = backend.pull()
        assert (again.id, again.attempt) == (job.id, 2)
        again.ack()


def test_a_service_that_stops_lets_backends_take_what_is_queued():
    with (
        serving("--cache-size", "16MiB", "--frontends", 1) as service,
        Client(service.endpoint) as client,
        Backend(service.endpoint, queue="last", credits=1) as backend,
    ):
        ids = [client.post(user(text(f"{number}")), queue="last") for number in range(3)]
        first = backend.pull()
        service.signal(signal.SIGTERM)
        assert first.id == ids[0]
        first.ack()
        for job_id in ids[1:]:
            job = backend.pull()
            assert job.id == job_id
            job.ack()
