"""Videos through a whole service: every payload, both doors, what requests may choose, and what happens beside them."""

import base64
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import (
    ROOT,
    decode_item,
    environment,
    image,
    photo,
    serving,
    text,
    user,
)
from tests.models import write_qwen3_vl
from tests.videos import animated, decoded, filmed, recorded, repeated, scene
from tokenizers import Tokenizer

from mmprep import Backend, Client, embedded

PAD = "<|video_pad|>"
TRUSTED = "--trust-request-mm-kwargs"


def video(data, kind="mp4"):
    return {"type": "video_url", "video_url": {"url": f"data:video/{kind};base64,{base64.b64encode(data).decode()}"}}


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "128MiB", TRUSTED) as running:
        yield running


@pytest.fixture(scope="module")
def film():
    return filmed(scene(10, 112, 84))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))


def expected(frames):
    """Return uint8 patches of frames whose sides are multiples of 28, so that the model does not resize them."""
    height, width, _ = frames[0].shape
    pairs = np.stack(frames).reshape(-1, 2, height // 28, 2, 14, width // 28, 2, 14, 3)
    patches = pairs.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return patches.reshape(-1, 1176), [len(frames) // 2, height // 14, width // 14]


def test_a_video_is_rendered_with_its_tensors(service, film, tokenizer):
    answer = service.render(user(video(film), text("What happens here?")))
    pixels, grid = expected(decoded(film))
    (element,) = answer["features"]["kwargs_data"]["video"]
    fields = decode_item(element)
    assert set(fields) == {"pixel_values_videos", "video_grid_thw"}
    assert np.array_equal(fields["pixel_values_videos"].array, pixels)
    assert (fields["pixel_values_videos"].kind, fields["pixel_values_videos"].dtype) == ("flat", "uint8")
    assert fields["video_grid_thw"].array.tolist() == grid
    assert fields["video_grid_thw"].arguments == {"keep_on_cpu": True}
    (metadata,) = answer["features"]["mm_metadata"]["video"]
    assert decode_item(metadata)["video_grid_thw"].array.tolist() == grid

    (place,) = answer["features"]["mm_placeholders"]["video"]
    length = int(np.prod(grid)) // 4
    assert place == {"offset": place["offset"], "length": length}
    around = answer["token_ids"][place["offset"] - 1 : place["offset"] + length + 1]
    pad, start, end = (tokenizer.token_to_id(token) for token in (PAD, "<|vision_start|>", "<|vision_end|>"))
    assert around == [start, *[pad] * length, end]


def test_every_payload_and_door_gives_the_same(service, film):
    messages = user(photo("cat.png"), video(film), text("?"))
    whole = service.render(messages)
    assert set(whole["features"]["mm_hashes"]) == {"image", "video"}
    plan = service.render(messages, mm_payload="none")
    assert plan["token_ids"] == whole["token_ids"]
    assert plan["features"]["mm_placeholders"] == whole["features"]["mm_placeholders"]
    assert plan["features"]["mm_hashes"] == whole["features"]["mm_hashes"]
    assert service.post("/tokenize", {"messages": messages}).json["tokens"] == whole["token_ids"]
    pixels = decode_item(whole["features"]["kwargs_data"]["video"][0])["pixel_values_videos"].array
    with Backend(service.endpoint, id="viewer") as backend:
        answer = service.render(messages, mm_payload="shm", backend_id=backend.id)
        item = backend.open(answer["features"]["mm_addresses"]["video"][0])
        with item.view() as arrays:
            assert np.array_equal(arrays["pixel_values_videos"], pixels)
        normalized = item.materialize(normalize=True)["pixel_values_videos"]
        assert normalized.dtype == np.float32
        item.release()
    with Client(service.endpoint) as client:
        result = client.chat(user({"type": "video_url", "video_url": {"url": film}}, text("?")), payload="tensors")
        (item,) = result.items["video"]
        assert np.array_equal(item.materialize()["pixel_values_videos"], pixels)


def test_a_plan_alone_is_the_plan_of_the_whole(service):
    data = filmed(33, encoder="mpeg4")
    before = service.render(user(video(data), text("?")), mm_payload="none", cache_salt="plan")
    after = service.render(user(video(data), text("?")), cache_salt="plan")
    assert before["token_ids"] == after["token_ids"]
    assert before["features"]["mm_placeholders"] == after["features"]["mm_placeholders"]


def grid_of(answer):
    return decode_item(answer["features"]["mm_metadata"]["video"][0])["video_grid_thw"].array.tolist()


def test_a_request_chooses_how_many_frames_are_taken(service, film):
    hashes = set()
    for chosen, pairs in (({}, 5), ({"num_frames": 4}, 2), ({"fps": 15}, 3), ({"num_frames": 4, "fps": 6}, 1)):
        answer = service.render(user(video(film), text("?")), media_io_kwargs={"video": chosen})
        assert grid_of(answer)[0] == pairs
        hashes.add(answer["features"]["mm_hashes"]["video"][0])
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("chosen", "name"),
    [({"num_frames": 0}, "num_frames"), ({"num_frames": 10**6}, "num_frames"), ({"fps": -2}, "fps"), ({"a": 1}, "a")],
)
def test_what_cannot_be_chosen_is_refused_by_its_place_in_the_request(service, film, chosen, name):
    for payload in ("tensors", "none"):
        answer = service.chat(user(video(film)), media_io_kwargs={"video": chosen}, mm_payload=payload)
        assert (answer.status, answer.error["param"]) == (400, f"media_io_kwargs.video.{name}")


def test_a_request_lets_the_processor_choose_frames_and_their_size(service, film):
    messages = user(video(film), text("?"))
    hashes = {service.render(messages, mm_payload="none")["features"]["mm_hashes"]["video"][0]}
    chosen = [({"fps": 12}, [2, 6, 8]), ({"num_frames": 6}, [3, 6, 8]), ({"fps": 12, "max_pixels": 4000}, [2, 2, 4])]
    for kwargs, grid in chosen:
        answer = service.render(messages, mm_processor_kwargs=kwargs)
        assert grid_of(answer) == grid
        assert answer["features"]["mm_placeholders"]["video"][0]["length"] == np.prod(grid) // 4
        counted = service.post("/tokenize", {"messages": messages, "mm_processor_kwargs": kwargs}).json
        assert counted["tokens"] == answer["token_ids"]
        hashes.add(answer["features"]["mm_hashes"]["video"][0])
    assert len(hashes) == 4
    both = {"media_io_kwargs": {"video": {"num_frames": 4}}, "mm_processor_kwargs": {"fps": 2}}
    for payload in ("tensors", "none"):
        refused = service.chat(messages, mm_payload=payload, **both)
        assert (refused.status, refused.error["param"]) == (400, "mm_processor_kwargs.fps")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_is_a_video_where_it_is_sent_as_one(service, kind):
    data = animated(6, kind)
    assert grid_of(service.render(user(video(data, "gif"), text("?"))))[0] == 3
    still = service.render(user(image(data, kind.lower()), text("?")))
    assert set(still["features"]["mm_hashes"]) == {"image"}


def test_bad_videos_are_refused_with_their_place_and_reason(service, film):
    cases = [
        (b"#EXTM3U\nfile:///etc/passwd\n", 415, "UnsupportedMediaError", "not a video of a kind that is read"),
        (Path(embedded.path().parent / "photos" / "cat.jpg").read_bytes(), 415, "UnsupportedMediaError", "image_url"),
        (recorded(), 415, "UnsupportedMediaError", "holds no video"),
        (film[: len(film) // 2], 422, "UnprocessableEntityError", "truncated"),
    ]
    for data, status, kind, words in cases:
        for payload in ("tensors", "none"):
            answer = service.chat(user(text("?"), video(data)), mm_payload=payload)
            assert (answer.status, answer.error["type"]) == (status, kind)
            assert answer.error["param"] == "messages[0].content[1].video_url"
            assert words in answer.error["message"]
    two = service.chat(user(video(film), video(film)))
    assert (two.status, "video" in two.error["message"]) == (400, True)


def test_limits_are_options(film):
    with serving("--max-image-pixels", 9000, "--max-video-duration", "1s", "--cache-size", "64MiB") as small:
        for data, option in ((film, "--max-image-pixels"), (filmed(40, rate=30), "--max-video-duration")):
            answer = small.chat(user(video(data)))
            assert (answer.status, answer.error["type"]) == (413, "PayloadTooLargeError")
            assert option in answer.error["message"]
        untrusted = small.chat(user(video(film)), media_io_kwargs={"video": {"fps": 1}})
        assert (untrusted.status, untrusted.error["param"]) == (400, "media_io_kwargs")


def test_qwen3_vl_takes_videos_with_the_times_of_their_frames(tmp_path, film, tokenizer):
    with serving("--cache-size", "64MiB", model=write_qwen3_vl(tmp_path / "three")) as three:
        answer = three.render(user(text("Now: "), video(film), text(" What?")), mm_dtype="float32")
        fields = decode_item(answer["features"]["kwargs_data"]["video"][0])
        assert set(fields) == {"pixel_values_videos", "video_grid_thw", "timestamps"}
        # 10 frames at 30 a second are four at least: 0, 3, 6 and 9, in two pairs.
        assert (fields["timestamps"].dtype, fields["timestamps"].array.tolist()) == ("float64", [0.05, 0.25])
        groups = int(np.prod(fields["video_grid_thw"].array[1:])) // 4
        marks = "<|vision_start|>" + PAD * groups + "<|vision_end|>"
        ids = tokenizer.encode(f"<0.1 seconds>{marks}<0.2 seconds>{marks}", add_special_tokens=False).ids
        (place,) = answer["features"]["mm_placeholders"]["video"]
        offset, length = place["offset"], place["length"]
        assert answer["token_ids"][offset : offset + length] == ids
        assert place["is_embed"] == [token_id == tokenizer.token_to_id(PAD) for token_id in ids]
        assert (
            answer["token_ids"]
            == three.post("/tokenize", {"messages": user(text("Now: "), video(film), text(" What?"))}).json["tokens"]
        )


# --- beside videos ----------------------------------------------------------------------------------------------------


def long_video(seed):
    """Return a video that takes a lane seconds: all of its frames have to be decoded to reach the last."""
    pictures = scene(seed + 12, 1280, 720)[seed:]
    return repeated(filmed(pictures, encoder="mpeg4"), 80)


def drawn(number):
    into = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(into, "PNG")
    return into.getvalue()


def test_small_pictures_are_answered_while_videos_are_processed():
    patient = (TRUSTED, "--task-timeout", "5m", "--request-timeout", "10m")
    with serving("--lanes", 2, "--cache-size", "256MiB", *patient) as service:
        ended = []

        def ask(seed):
            first_and_last = {"video": {"num_frames": 2}}
            answer = service.chat(user(video(films[seed]), text("?")), media_io_kwargs=first_and_last)
            ended.append((seed, answer.status))

        films = [long_video(seed) for seed in range(2)]
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        service.status_when(_waits, "one video to wait for the other")
        for number in range(10):
            assert service.render(user(image(drawn(number), "png"), text("?")))["features"]["mm_hashes"]["image"]
        assert ended == []
        for thread in threads:
            thread.join()
        assert sorted(ended) == [(0, 200), (1, 200)]


def _waits(status):
    return any(queue["depth"] for queue in status["queues"].values())


_MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
from mmprep import embedded
from mmprep.card import ItemOptions, pack_io
from mmprep.items import field_array, region_size
from mmprep_worker.lanes.warmup import warm_up
from mmprep_worker.models.family import MediaLimits
from mmprep_worker.models.registry import load_family

def memory(kind):
    return int(re.search(kind + ":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024

family = load_family(embedded.path(), MediaLimits(10**8, 768, 3600.0, 3600.0))
warm_up(family, {"image", "video"})
medium = Path(sys.argv[1]).read_bytes()
prepared = family.open("video", medium, ItemOptions("uint8", pack_io({"num_frames": -1})))
region = memoryview(bytearray(region_size(prepared.meta.fields)))
np.frombuffer(region, np.uint8)[:] = 1
resident = memory("VmRSS")
prepared.fill({spec.name: field_array(region, spec) for spec in prepared.meta.fields})
print(json.dumps(memory("VmHWM") - resident))
"""


def test_a_lane_holds_few_frames_of_a_video_at_a_time(tmp_path):
    frames, frame = 60, 1920 * 1080 * 3
    pictures = scene(6, 1920, 1080)
    (tmp_path / "film.mp4").write_bytes(filmed(pictures * (frames // 6), encoder="mpeg4"))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "film.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
    assert json.loads(done.stdout) < 12 * frame < frames * frame / 4
