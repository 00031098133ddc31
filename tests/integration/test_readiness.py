"""A service before its first request: warm, with empty caches and metrics at zero; and one that does not get warm."""

import re
import socket

import pytest
from tests.integration.service import Service, environment, eventually, photo, serving, text, user

SMALL = ("--cache-size", "16MiB", "--frontends", "1", "--lanes", "2")

#: A module in place of a decoder: whatever is called raises, with a path in its message, while the gate is there.
BROKEN = """
import importlib, os, sys

if os.path.exists({gate!r}):
    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)
        def function(*_, **__):
            raise KeyError("/models/secret.json")
        return function
else:
    sys.path.remove({directory!r})
    del sys.modules[{name!r}]
    importlib.import_module({name!r})
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_warm_service_has_counted_nothing_and_cached_nothing():
    with serving(*SMALL) as service:
        metrics = service.metrics()
        counted = {name: value for name, value in metrics.items() if re.search(r"(_total|_count|_sum)(\{|$)", name)}
        assert "mmprep_ring_evictions_total" in counted
        for modality in ("image", "video"):
            for name in ("mmprep_mm_cache_queries_total", "mmprep_mm_cache_hits_total", "vllm:mm_cache_hits_total"):
                assert f'{name}{{modality="{modality}"}}' in counted
        assert {name for name, value in counted.items() if value} == set()
        status = service.status()
        assert status["ring"]["entries"] == status["ring"]["ready"] == status["spills"]["made"] == 0
        assert [lane["state"] for lane in status["lanes"]] == ["idle", "idle"]
        first = service.render(user(photo("cat.png"), text("Hello")), mm_payload="none")
        assert first["features"]["mm_hashes"]["image"]
        metrics = service.metrics()
        assert metrics['mmprep_mm_cache_queries_total{modality="image"}'] == 1
        assert metrics['mmprep_mm_cache_hits_total{modality="image"}'] == 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("simplejpeg", r"a lane cannot be warmed up with a small image in uint8: KeyError"),
        ("pybase64", r"a frontend cannot be warmed up \(KeyError\); its log says more"),
    ],
    ids=["lane", "frontend"],
)
def test_a_failing_warm_up_keeps_the_service_unready_and_says_why(runtime_dir, tmp_path, name, why):
    gate, directory = tmp_path / "gate", tmp_path / "broken"
    gate.touch()
    directory.mkdir()
    (directory / f"{name}.py").write_text(BROKEN.format(gate=str(gate), directory=str(directory), name=name))
    env = {"PYTHONPATH": f"{directory}:{environment()['PYTHONPATH']}"}
    service = Service(runtime_dir, *SMALL, "--port", free_port(), env=env)
    service.url = f"http://127.0.0.1:{service.process.args[service.process.args.index('--port') + 1]}"

    def told():
        answer = service.get_or_none("/ready")
        return answer is not None and re.search(why, answer.error["message"]) and answer

    try:
        answer = eventually(told, "the reason")
        assert (answer.status, answer.error["type"]) == (503, "ServiceUnavailableError")
        assert "/" not in answer.error["message"]
        assert "Traceback" not in answer.error["message"]
        refused = service.chat(user(text("Hello")))
        assert (refused.status, refused.error["message"]) == (503, answer.error["message"])
        assert service.get("/health").status == 200
        if name == "simplejpeg":  # lanes are tried again
            gate.unlink()
            eventually(lambda: service.get("/ready").status == 200, "a lane that got warm")
            assert service.chat(user(photo("cat.png"))).status == 200
    finally:
        assert service.stop() == 0, service.stderr
