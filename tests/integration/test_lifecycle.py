"""Starting, stopping, and the sudden death of each process: the service goes on, and nothing is left of it."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import (
    SHM,
    Service,
    decode_item,
    environment,
    eventually,
    image,
    is_alive,
    mmprep,
    photo,
    serving,
    text,
    user,
)
from tests.models import write_llava15, write_qwen2_vl

from mmprep import Backend, Client

SMALL = ("--cache-size", "16MiB", "--frontends", 2, "--lanes", 2)
SMALLEST = ("--cache-size", "16MiB", "--frontends", 1, "--lanes", 1)


def drawn(number, side=250):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG", compress_level=0)
    return into.getvalue()


def renders(service):
    """Check that the service answers, with tensors."""
    answer = service.render(user(photo("cat.png"), text("?")))
    return decode_item(answer["features"]["kwargs_data"]["image"][0])["pixel_values"].array.any()


def everyone(service):
    return {pid for pids in service.pids().values() for pid in pids}


def segment_of(service):
    return SHM / service.status()["segment"].lstrip("/")


def contents(directory):
    return sorted(path.name for path in directory.iterdir())


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_clean_stop_answers_what_is_under_way_and_leaves_nothing(runtime_dir):
    service = Service(runtime_dir, *SMALL).ready()
    pids, segment = everyone(service), segment_of(service)
    assert segment.exists()
    assert contents(runtime_dir)
    parts = [image(drawn(number, 600), "png") for number in range(4)]
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(service.chat, user(*parts[n % 4 :], text(str(n)))) for n in range(6)]
        eventually(lambda: service.metrics()["mmprep_inflight"] >= 1, "requests under way")
        service.signal(signal.SIGTERM)
        status = service.wait()
        answers = [call.result() if call.exception() is None else None for call in calls]
    assert status == 0, service.stderr
    assert any(answer is not None and answer.status == 200 for answer in answers)
    for answer in answers:
        # One whose connection had not been accepted finds nobody; one that came too late is told so.
        assert answer is None or answer.status in {200, 503}
    assert not segment.exists()
    assert not [pid for pid in pids if is_alive(pid)]
    assert contents(runtime_dir) == []
    assert "Traceback" not in service.stderr


def test_a_second_sigterm_ends_at_once_and_leaves_nothing(runtime_dir):
    service = Service(runtime_dir, *SMALLEST, "--drain-timeout", "600s", "--request-timeout", "600s").ready()
    pids, segment = everyone(service), segment_of(service)
    for pid in service.pids()["lane"]:
        os.kill(pid, signal.SIGSTOP)  # what is under way will never end
    hanging = threading.Thread(target=lambda: _ignoring(service), daemon=True)
    hanging.start()
    eventually(lambda: service.metrics()["mmprep_inflight"] >= 1, "a request under way")
    service.signal(signal.SIGTERM)
    eventually(lambda: service.get("/ready").status == 503, "the first signal is seen")
    assert service.process.poll() is None
    service.signal(signal.SIGTERM)
    service.wait()
    hanging.join()
    eventually(lambda: not [pid for pid in pids if is_alive(pid)], "the end of every process")
    eventually(lambda: not segment.exists(), "the end of the segment")
    assert contents(runtime_dir) == []


def test_while_it_drains_the_service_says_so_refuses_work_and_gives_leases_their_time(runtime_dir):
    service = Service(runtime_dir, *SMALLEST, "--drain-timeout", "600s").ready()
    with Backend(service.endpoint, id="engine") as backend:
        answer = service.render(user(image(drawn(5), "png")), mm_payload="shm", backend_id="engine")
        item = backend.open(answer["features"]["mm_addresses"]["image"][0])
        second = service.render(user(image(drawn(6), "png")), mm_payload="shm", backend_id="engine")
        lease = second["features"]["mm_addresses"]["image"][0]["lease"]
        service.signal(signal.SIGTERM)
        eventually(lambda: service.get("/ready").status == 503, "the signal is seen")
        refused = service.chat(user(image(drawn(7), "png")))
        assert (refused.status, refused.error["type"]) == (503, "ServiceUnavailableError")
        assert refused.headers["Retry-After"]
        assert service.get("/health").status == 200
        held = {"backend_id": "engine", "leases": [lease]}
        assert service.post("/leases/renew", held).json["lost"] == []
        assert service.post("/leases/release", held).status == 200
        assert item.materialize()["pixel_values"].any()
        assert service.process.poll() is None
        item.release()
        assert service.wait() == 0, service.stderr
    assert contents(runtime_dir) in ([], ["locks"])


def test_leases_that_nobody_releases_end_with_the_drain_timeout(runtime_dir):
    service = Service(runtime_dir, *SMALLEST, "--drain-timeout", "1s").ready()
    with Client(service.endpoint) as client:
        item = client.chat(user({"type": "image_url", "image_url": {"url": drawn(5)}}), payload="shm").items["image"][0]
        with item.view() as arrays:
            expected = arrays["pixel_values"].copy()
            assert service.stop() == 0, service.stderr
            assert np.array_equal(arrays["pixel_values"], expected), "who has it mapped reads on"


def _ignoring(service):
    with contextlib.suppress(OSError):
        service.chat(user(image(drawn(77), "png")))


def test_a_directory_that_the_service_made_is_gone_with_it_and_every_process_logs_as_it_was_asked_to(
    runtime_dir, lasting
):
    service = Service(runtime_dir / "made", *SMALLEST, "--log-level", "info").ready()
    assert service.stop() == 0
    assert contents(runtime_dir) == []
    warm = re.compile(r"^[-0-9]+ [:,0-9]+ INFO mmprep\.lane: lane \d is warm$")
    assert len([line for line in service.lines if warm.match(line)]) == 2
    assert not [line for line in lasting.lines if warm.match(line)], "of the level warning, which is the default"


# --- sudden deaths ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting():
    with serving(*SMALL) as running:
        yield running


def test_a_killed_frontend_is_replaced_and_its_clients_are_served_by_another(lasting):
    before = lasting.pids()
    with Client(lasting.endpoint) as client, ThreadPoolExecutor(8) as threads:
        part = {"type": "image_url", "image_url": drawn(1)}
        assert client.chat(user(part), payload="shm").items["image"][0].materialize()["pixel_values"].any()
        victim = before["frontend"][0]
        calls = [threads.submit(client.chat, user(part, text(str(n))), payload="tensors") for n in range(60)]
        os.kill(victim, signal.SIGKILL)
        assert all(call.result().items["image"][0].materialize()["pixel_values"].any() for call in calls)
        now = lasting.status_when(
            lambda s: len(s["frontends"]) == 2 and all(f["pid"] != victim and f["ready"] for f in s["frontends"]),
            "another frontend",
        )
        assert before["frontend"][1] in {frontend["pid"] for frontend in now["frontends"]}
        assert all(client.chat(user(part), payload="none").items for _ in range(8)), "also through the new one"
    after = lasting.pids()
    assert (after["writer"], after["lane"]) == (before["writer"], before["lane"])
    assert all(renders(lasting) for _ in range(8))
    lasting.quiet()


def test_a_killed_lane_is_replaced_and_its_request_is_answered(lasting):
    before = lasting.pids()
    lanes = before["lane"]
    for lane in lanes:
        os.kill(lane, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(lasting.chat, user(image(drawn(10 + n), "png"))) for n in range(2)]
        lasting.status_when(lambda s: all(lane["state"] == "busy" for lane in s["lanes"]), "busy lanes")
        os.kill(lanes[0], signal.SIGKILL)
        os.kill(lanes[1], signal.SIGCONT)
        assert [call.result().status for call in calls] == [200, 200]
    after = lasting.status_when(
        lambda s: all(lane["pid"] and lane["state"] == "idle" for lane in s["lanes"]), "warm lanes"
    )
    assert lanes[0] not in {lane["pid"] for lane in after["lanes"]}
    assert after["worker"] == lasting.status()["worker"]
    assert lasting.metrics()["mmprep_lane_restarts_total"] == 1
    lasting.quiet()


def test_a_picture_that_kills_every_lane_is_refused_and_the_others_go_on(lasting):
    """The item is tried once more, then quarantined; here the picture is innocent and the test does the killing."""
    poison = user(image(drawn(20), "png"))
    with ThreadPoolExecutor(1) as threads:
        for lane in lasting.pids()["lane"]:
            os.kill(lane, signal.SIGSTOP)
        call = threads.submit(lasting.chat, poison)
        for _ in range(2):
            status = lasting.status_when(lambda s: [lane for lane in s["lanes"] if lane["state"] == "busy"], "a lane")
            (busy,) = (lane["pid"] for lane in status["lanes"] if lane["state"] == "busy")
            for other in {lane["pid"] for lane in status["lanes"]} - {busy, 0}:
                os.kill(other, signal.SIGSTOP)
            os.kill(busy, signal.SIGKILL)
            lasting.status_when(lambda s, busy=busy: busy not in {lane["pid"] for lane in s["lanes"]}, "its end")
            if call.done():
                break
        for lane in lasting.pids()["lane"]:
            os.kill(lane, signal.SIGCONT)
        answer = call.result()
    assert answer.status in {200, 422}
    if answer.status == 422:
        assert answer.error["param"] == "messages[0].content[0].image_url"
        assert lasting.chat(poison).status == 422, "quarantined"
    assert renders(lasting)
    lasting.quiet()


def test_a_killed_writer_is_replaced_and_a_request_under_way_is_answered(lasting):
    before = lasting.pids()
    segment = segment_of(lasting)
    for lane in before["lane"]:
        os.kill(lane, signal.SIGSTOP)
    with Client(lasting.endpoint) as client, ThreadPoolExecutor(2) as threads:
        held = None
        part = {"type": "image_url", "image_url": drawn(30)}
        native = threads.submit(client.chat, user(part), payload="tensors", timeout=60)
        lasting.status_when(lambda s: [lane for lane in s["lanes"] if lane["state"] == "busy"], "a busy lane")
        os.kill(before["writer"][0], signal.SIGKILL)
        held = native.result().items["image"][0]
        assert held.materialize()["pixel_values"].any()
        shared = client.chat(user(part), payload="shm").items["image"][0]
        assert np.array_equal(shared.materialize()["pixel_values"], held.materialize()["pixel_values"])
    after = lasting.pids()
    assert after["writer"] != before["writer"]
    assert after["frontend"] == before["frontend"]
    assert not set(before["lane"]) & set(after["lane"])
    assert not [lane for lane in before["lane"] if is_alive(lane)]
    assert segment_of(lasting).exists()
    if segment != segment_of(lasting):
        assert not segment.exists(), "the old segment has no name any more"
    eventually(lambda: lasting.get("/ready").status == 200, "ready again")
    assert all(renders(lasting) for _ in range(4))
    lasting.quiet()


def test_children_of_a_killed_supervisor_end_and_the_next_start_removes_what_they_left(runtime_dir):
    service = Service(runtime_dir, *SMALL).ready()
    pids = everyone(service)
    assert renders(service)
    assert service.kill() == -signal.SIGKILL
    eventually(lambda: not [pid for pid in pids if is_alive(pid)], "the end of every process")
    again = Service(runtime_dir, *SMALLEST).ready()
    assert renders(again)
    segment = segment_of(again)
    uid_segments = {path.name for path in SHM.glob(f"{segment.name.rpartition('-')[0]}-*")}
    assert uid_segments == {segment.name}, "only the new service's"
    assert again.stop() == 0
    assert contents(runtime_dir) == []


def test_all_processes_killed_at_once_leave_what_the_next_start_removes(runtime_dir):
    service = Service(runtime_dir, *SMALL).ready()
    pids, segment = everyone(service), segment_of(service)
    for pid in [*(pids - {service.process.pid}), service.process.pid]:  # so that it starts others in between
        os.kill(pid, signal.SIGKILL)
    service.wait()
    eventually(lambda: not [pid for pid in pids if is_alive(pid)], "the end of every process")
    assert segment.exists()
    assert contents(runtime_dir)
    again = Service(runtime_dir, *SMALLEST).ready()
    assert not segment.exists()
    assert renders(again)
    assert again.stop() == 0
    assert contents(runtime_dir) == []


# --- what keeps a service from starting -------------------------------------------------------------------------------


def refused(runtime_dir, *arguments, env=None, prefix=()):
    """Start a service that must fail, and return the one message that says why."""
    if not any(str(argument).startswith("--port") for argument in arguments):
        arguments = (*arguments, "--port", 0)
    done = mmprep("serve", "--runtime-dir", runtime_dir, *SMALLEST, *arguments, env=env, prefix=prefix)
    assert done.returncode not in {0, -signal.SIGKILL}, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    told = {line for line in lines if line.startswith("mmprep") and not re.search(r": starting |stands above$", line)}
    assert len(told) == 1, done.stderr
    assert ": ready after" not in done.stderr
    return told.pop()


def test_a_second_service_and_a_taken_port_are_refused_and_harm_nobody(runtime_dir, lasting):
    before = lasting.pids()
    message = refused(lasting.runtime_dir)
    assert "--runtime-dir" in message
    assert f"pid {before['supervisor'][0]}" in message
    port = lasting.url.rpartition(":")[2]
    assert "--port" in refused(runtime_dir, "--port", port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "--port" in refused(runtime_dir, "--port", other.getsockname()[1])
    assert contents(runtime_dir) == []
    assert lasting.pids() == before
    assert renders(lasting)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "x"),
        ("--port", 70_000),
        ("--frontends", 0),
        ("--lanes", -1),
        ("--cache-size", "12 parsecs"),
        ("--cache-size", "1kB"),
        ("--max-object-size", "15MiB"),
        ("--lease-seconds", "soon"),
        ("--tensor-dtype", "int4"),
        ("--hash", "md5"),
        ("--limit-mm-per-prompt", "image"),
        ("--max-model-len", "long"),
        ("--chat-template", "/nowhere/template.jinja"),
        ("--config", "/nowhere/mmprep.toml"),
        ("--log-level", "loud"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_option(runtime_dir, option, value):
    message = refused(runtime_dir, f"{option}={value}")
    assert option in message
    assert contents(runtime_dir) == []


def test_a_wrong_value_in_the_environment_names_its_option_too(runtime_dir):
    assert "--queue-limit" in refused(runtime_dir, env={"MMPREP_QUEUE_LIMIT": "none"})
    assert "--allowed-media-domains" in refused(runtime_dir, "--allowed-media-domains", "http://a.example/")


def test_a_host_that_is_not_this_machines_is_refused(runtime_dir):
    assert "--host" in refused(runtime_dir, "--host", "192.0.2.1")
    assert contents(runtime_dir) == []


def _without(name):
    return lambda directory: (directory / name).unlink()


def _broken(name):
    return lambda directory: (directory / name).write_text('{"a": ')


def _no_tokenizer(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without("config.json"), "config.json"),
        (_broken("config.json"), "config.json"),
        (_broken("preprocessor_config.json"), "preprocessor_config.json"),
        (_without("preprocessor_config.json"), "preprocessor_config.json"),
        (_broken("tokenizer.json"), "tokenizer"),
        (_without("tokenizer.json"), "tokenizer"),
        (_no_tokenizer, "tokenizer"),
        (lambda directory: (directory / "chat_template.jinja").write_text("{% for %}"), "template"),
    ],
    ids=[
        "no config.json",
        "broken config.json",
        "broken preprocessor_config.json",
        "no preprocessor_config.json",
        "broken tokenizer.json",
        "no tokenizer.json",
        "no tokenizer at all",
        "broken template",
    ],
)
def test_a_spoilt_model_directory_is_told_by_the_file(runtime_dir, tmp_path, spoil, words):
    directory = write_qwen2_vl(tmp_path / "model")
    spoil(directory)
    assert words in refused(runtime_dir, directory)
    assert contents(runtime_dir) == []


def test_a_dtype_that_the_model_does_not_have_is_refused_by_its_option(runtime_dir, tmp_path):
    message = refused(runtime_dir, write_llava15(tmp_path / "model"), "--tensor-dtype", "uint8")
    assert re.search("--tensor-dtype uint8: .*float32, bfloat16, float16", message)
    assert contents(runtime_dir) == []


HIDE = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hidden())
"""


def with_modules(directory, **sources):
    """Return an environment in which these modules come before those that are installed."""
    directory.mkdir(exist_ok=True)
    for name, source in sources.items():
        (directory / f"{name}.py").write_text(source)
    return {"PYTHONPATH": f"{directory}{os.pathsep}{environment()['PYTHONPATH']}"}


@pytest.mark.parametrize("command", ["serve", "render"])
def test_the_base_install_is_told_to_install_the_server(runtime_dir, tmp_path, command):
    (tmp_path / "request.json").write_text("{}")
    env = with_modules(tmp_path / "hidden", sitecustomize=HIDE.format(names={"uvloop", "PIL"}))
    arguments = [tmp_path / "request.json"] if command == "render" else ["--runtime-dir", runtime_dir, "--port", 0]
    done = mmprep(command, *arguments, env=env)
    assert done.returncode == 1
    assert done.stderr == (
        f"mmprep {command}: uvloop, pillow cannot be found; install the server's dependencies: "
        "pip install 'mmprep[server]'\n"
    )
    assert contents(runtime_dir) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("uvloop", "raise RuntimeError('broken')", "the frontend ended 5 times before it was ready.*status 1"),
        ("simplejpeg", "raise RuntimeError('broken')", "the lanes end with status 1 before they are warm"),
        ("simplejpeg", "import os; os.abort()", "the lanes end with status -6 before they are warm"),
    ],
    ids=["frontend", "lane", "lane that is killed"],
)
def test_a_process_that_can_never_start_ends_the_service(runtime_dir, tmp_path, module, source, words):
    env = with_modules(tmp_path / "broken", **{module: source})
    done = mmprep("serve", "--runtime-dir", runtime_dir, "--port", 0, "--cache-size", "16MiB", env=env)
    assert done.returncode == 1, done.stderr
    assert re.search(f"^mmprep: {words}", done.stderr, re.MULTILINE), done.stderr
    assert contents(runtime_dir) == []


GATE = """
import importlib, os, sys, time

while os.path.exists({gate!r}):
    time.sleep(0.01)
sys.path.remove({directory!r})
del sys.modules["simplejpeg"]
importlib.import_module("simplejpeg")
"""


def test_a_replaced_writer_is_not_ready_before_its_lanes_are_warm(tmp_path):
    gate, directory = tmp_path / "gate", tmp_path / "gated"
    env = with_modules(directory, simplejpeg=GATE.format(gate=str(gate), directory=str(directory)))
    with serving("--cache-size", "16MiB", "--frontends", 1, "--lanes", 2, env=env) as service:
        gate.touch()
        killed = service.pids()["writer"][0]
        os.kill(killed, signal.SIGKILL)
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(service.chat, user(photo("cat.png")))
            service.status_when(
                lambda s: s.get("worker", {}).get("pid") not in {None, killed} and s["pins"], "the frontend's offer"
            )
            answer = service.get("/ready")
            gate.unlink()
            assert (answer.status, answer.error["type"]) == (503, "ServiceUnavailableError")
            assert waiting.result().status == 200
        eventually(lambda: service.get("/ready").status == 200, "a service that is ready again")


def test_a_lane_that_cannot_be_replaced_at_the_moment_does_not_end_the_service(tmp_path):
    directory = write_qwen2_vl(tmp_path / "model")
    needed, away = directory / "preprocessor_config.json", tmp_path / "away.json"
    with serving(*SMALL, model=directory) as service:
        needed.rename(away)
        os.kill(service.pids()["lane"][0], signal.SIGKILL)
        eventually(
            lambda: "cannot start, and is tried again: MODEL: preprocessor_config.json" in service.stderr,
            "the lane's message",
        )
        assert service.chat(user(text("Hello"), photo("cat.png"))).status == 200
        away.rename(needed)
        service.status_when(lambda s: [lane["state"] for lane in s["lanes"]] == ["idle", "idle"], "two lanes")


def test_a_missing_model_directory_and_an_unknown_hub_id_are_told(runtime_dir, tmp_path):
    assert "no-such-model" in refused(runtime_dir, tmp_path / "no-such-model")
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    message = refused(runtime_dir, "nobody/no-such-model", env=cache)
    assert "nobody/no-such-model" in message
    assert "local directory" in message
    assert contents(runtime_dir) == []


def test_a_small_dev_shm_is_an_error_that_names_the_size(runtime_dir):
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", mount, "sh")
    if mmprep("--version", prefix=prefix).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    message = refused(runtime_dir, prefix=prefix)
    assert "/dev/shm" in message
    assert "MiB" in message
    assert contents(runtime_dir) == []


def test_a_json_status_is_told_while_the_service_starts(runtime_dir):
    service = Service(runtime_dir, *SMALL)
    eventually((runtime_dir / "supervisor.sock").exists, "the supervisor's socket")
    status = mmprep("status", "--json", "--runtime-dir", runtime_dir)
    if status.returncode == 0:
        assert json.loads(status.stdout)["supervisor"]["pid"] == service.process.pid
    assert service.ready().stop() == 0
