"""Tensors of torch on a real service's shared memory: what they hold, and what ends them."""

import asyncio
import importlib.metadata
import re
import subprocess
import sys

import numpy as np
import pytest
from tests.integration.service import DATA, ROOT, environment, serving, text, user
from tests.torch_too import torch_too  # noqa: F401 -- a fixture of every test here

from mmprep import AsyncBackend, AsyncClient, Backend, Client, InvalidRequest, LeaseLost

CAT = {"type": "image_url", "image_url": {"url": (DATA / "cat.png").read_bytes()}}
ROCKET = {"type": "image_url", "image_url": {"url": (DATA / "rocket.jpg").read_bytes()}}
CHAT = user(CAT, ROCKET, text("What do they show?"))


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "128MiB") as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with Client(service.endpoint) as client:
        yield client


@pytest.fixture
def bridge():
    from mmprep.bridges import torch

    return torch


def test_no_process_of_the_service_has_torch(service, client):
    client.chat(CHAT, payload="none")
    assert importlib.metadata.version("torch")
    assert service.mapping("libtorch") == []
    assert service.mapping("libc.so")


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16", "float16"])
def test_a_jobs_tensors_are_those_of_the_job_in_the_dtype_asked_for(service, client, torch, bridge, dtype):
    with Backend(service.endpoint, queue="engine-0") as backend:
        client.post(CHAT, queue="engine-0", mm_dtype=dtype)
        job = backend.pull()
        with job.view() as arrays, bridge.view(job) as tensors:
            assert [set(one) for one in tensors["image"]] == [{"pixel_values", "image_grid_thw"}] * 2
            for found, expected in zip(tensors["image"], arrays["image"], strict=True):
                assert found["pixel_values"].dtype == getattr(torch, dtype)
                assert found["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
                bits = found["pixel_values"].contiguous().view(torch.uint8).clone().numpy()
                assert bits.tobytes() == expected["pixel_values"].tobytes()
            for item, expected in zip(job.items["image"], arrays["image"], strict=True):
                own = bridge.materialize(item)["pixel_values"]
                assert own.view(torch.uint8).numpy().tobytes() == expected["pixel_values"].tobytes()
        job.ack()


def test_bfloat16_is_float32_rounded(client, torch, bridge):
    exact, rounded = (client.chat(CHAT, mm_dtype=dtype).items["image"][0] for dtype in ("float32", "bfloat16"))
    with bridge.view(exact) as floats, bridge.view(rounded) as halves:
        assert torch.equal(floats["pixel_values"].to(torch.bfloat16), halves["pixel_values"])


@pytest.mark.parametrize("payload", ["shm", "tensors"])
def test_uint8_pixels_are_normalised_to_the_bit(client, torch, bridge, payload):
    as_bytes, floats = (client.chat(CHAT, payload=payload, mm_dtype=d).items["image"][0] for d in ("uint8", "float32"))
    expected = torch.from_numpy(floats.materialize()["pixel_values"])
    with bridge.view(as_bytes) as tensors:
        found = bridge.normalized(as_bytes, tensors)
        assert torch.equal(found["image_grid_thw"].clone(), tensors["image_grid_thw"])
    assert torch.equal(found["pixel_values"], expected)
    assert torch.equal(bridge.materialize(as_bytes, normalize=True)["pixel_values"], expected)
    with pytest.raises(InvalidRequest, match="no uint8 pixels"), bridge.view(floats) as tensors:
        bridge.normalized(floats, tensors)


def test_items_are_joined_as_a_model_takes_them(client, torch, bridge):
    items = client.chat(CHAT).items["image"]
    own = [bridge.materialize(item) for item in items]
    joined = bridge.join(items[0].fields, own)
    assert torch.equal(joined["image_grid_thw"], torch.stack([one["image_grid_thw"] for one in own]))
    assert torch.equal(joined["pixel_values"], torch.cat([one["pixel_values"] for one in own]))
    with bridge.view(items[0]) as tensors:
        one = bridge.join(items[0].fields, [tensors])
        assert one["pixel_values"] is tensors["pixel_values"]
        assert one["image_grid_thw"].tolist() == [own[0]["image_grid_thw"].tolist()]


def test_copies_on_a_device_are_plain_and_outlive_the_block(client, torch, bridge):
    item = client.chat(CHAT).items["image"][0]
    with bridge.view(item) as tensors:
        copies = bridge.to_device(tensors, "cpu")
    item.release()
    assert {type(one) for one in copies.values()} == {torch.Tensor}
    assert copies["pixel_values"].shape[1] == 1176
    copies["pixel_values"].zero_()


def test_copies_on_a_gpu_go_by_way_of_pinned_memory(client, torch, bridge):
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    item = client.chat(CHAT).items["image"][0]
    with bridge.view(item) as tensors:
        copies = bridge.to_device(tensors, "cuda")
    expected = bridge.materialize(item)
    for name, one in copies.items():
        assert (one.device.type, torch.equal(one.cpu(), expected[name])) == ("cuda", True)


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_real_model_computes_from_a_queues_tensors_what_it_computes_from_those_of_transformers(service):
    command = [sys.executable, "-W", "error", ROOT / "scripts" / "real_model.py", service.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    said = re.findall(r"^(\S+).* logits differ by up to (\S+?)(?:;|$)", done.stdout, re.MULTILINE)
    found = {what: float(difference) for what, difference in said}
    assert found.keys() == {"exchanged", "float32", "uint8", "bfloat16"}
    assert found["exchanged"] > 0.1  # the pictures matter
    assert found["float32"] == found["uint8"] == 0
    assert 0 < found["bfloat16"] < 0.01


# --- the end ----------------------------------------------------------------------------------------------------------


ENDS = {
    "the job is acknowledged": lambda job, _: job.ack(),
    "the job is given back": lambda job, _: job.release(),
    "an item is released": lambda job, _: job.items["image"][0].release(),
    "the backend is closed": lambda _, backend: backend.close(),
}


@pytest.mark.parametrize("end", ENDS)
def test_tensors_are_an_error_and_no_crash_after(service, client, bridge, end):
    with Backend(service.endpoint, queue="ends") as backend:
        client.post(CHAT, queue="ends")
        job = backend.pull()
        with bridge.view(job) as tensors:
            pixels = tensors["image"][0]["pixel_values"]
            rows, kept = pixels[3:5], pixels.clone()
            ENDS[end](job, backend)
            for one in (pixels, rows):
                with pytest.raises((LeaseLost, InvalidRequest), match=r"released|closed"):
                    one.sum()
        with pytest.raises(LeaseLost, match="block"):
            pixels.sum()
        assert kept.shape == pixels.shape


def test_tensors_are_an_error_after_their_block_and_stay_good_in_another(client, bridge):
    item = client.chat(CHAT).items["image"][0]
    with bridge.view(item) as outer, bridge.view(item) as inner:
        pass
    with bridge.view(item) as again:
        for one in (outer, inner):
            with pytest.raises(LeaseLost, match="block"):
                one["pixel_values"].clone()
        assert again["pixel_values"].clone().shape == outer["pixel_values"].shape


def test_what_is_left_of_a_closed_client_is_an_error_and_no_crash(service, bridge):
    with Client(service.endpoint) as client:
        view = bridge.view(client.chat(CHAT).items["image"][0])
        pixels = view.__enter__()["pixel_values"]
        assert pixels.sum() > 0
    with pytest.raises(InvalidRequest, match="closed"):
        pixels.sum()


def test_inline_tensors_are_read_only_too_and_end_with_their_block(client, bridge):
    item = client.chat(CHAT, payload="tensors").items["image"][0]
    with bridge.view(item) as tensors:
        with pytest.raises(InvalidRequest, match="clone"):
            tensors["pixel_values"][0] = 1
        assert np.array_equal(tensors["pixel_values"].clone().numpy(), item.materialize()["pixel_values"])
    with pytest.raises(LeaseLost, match="block"):
        tensors["pixel_values"].clone()


def test_asynchronous_clients_and_backends_lend_them_too(service, bridge):
    async def work():
        async with AsyncClient(service.endpoint) as client, AsyncBackend(service.endpoint, queue="async") as backend:
            await client.post(CHAT, queue="async")
            job = await backend.pull()
            async with bridge.view(job) as tensors:
                of_job = tensors["image"][0]["pixel_values"].clone()
            await job.ack()
            async with bridge.view((await client.chat(CHAT)).items["image"][0]) as tensors:
                of_item = tensors["pixel_values"].clone()
            with pytest.raises(LeaseLost, match="block"):
                tensors["pixel_values"].clone()
            return of_job, of_item

    of_job, of_item = asyncio.run(work())
    assert of_job.equal(of_item)


def test_an_item_without_tensors_has_none_to_lend(client, bridge):
    item = client.chat(CHAT, payload="none").items["image"][0]
    with pytest.raises(InvalidRequest, match="no tensors"), bridge.view(item):
        pass
