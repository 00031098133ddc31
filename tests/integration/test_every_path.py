"""What is the same whatever path a request takes: ids, ranges, tensors, and what the cache counts and computes.

On the embedded model and on one of the published size of Qwen2-VL. What is expected is made by transformers and by code of
this test; answers are decoded by the tests' own decoder.
"""

import io
import itertools

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, image, photo, serving, text, user
from tests.models import write_full_size
from transformers import AutoImageProcessor, AutoTokenizer

from mmprep import Backend, Client, embedded

PHOTOS = ("astronaut.jpg", "cat.png", "coffee.webp", "rocket.jpg")
PAD = "<|image_pad|>"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]
CHATS = {
    "text": ((), {}),
    "tools": ((), {"tools": TOOLS}),
    "tools and a picture": (PHOTOS[:1], {"tools": TOOLS}),
    **{f"pictures {count}": (PHOTOS[:count], {}) for count in (1, 2, 3, 4)},
}
#: Series that are counted under two names.
QUERIES, HITS = ("mm_cache_queries_total", "mm_cache_hits_total")
seeds = itertools.count(1)


@pytest.fixture(scope="module", params=["embedded", "full size"])
def model(request, tmp_path_factory):
    return (
        embedded.path() if request.param == "embedded" else write_full_size(tmp_path_factory.mktemp("full") / "model")
    )


@pytest.fixture(scope="module")
def service(model):
    with serving("--cache-size", "128MiB", "--enable-injection", model=model) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def processor(model):
    return AutoImageProcessor.from_pretrained(model)


def new_picture():
    """Return a picture that no service has seen."""
    noise = np.random.default_rng(next(seeds)).integers(0, 256, (84, 112, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def tiled(token_ids, pad_id):
    """Return the runs of the placeholder's id, as (offset, length)."""
    runs, start = [], 0
    for is_pad, run in itertools.groupby(token_ids, pad_id.__eq__):
        length = len(list(run))
        if is_pad:
            runs.append((start, length))
        start += length
    return runs


@pytest.mark.parametrize("name", CHATS)
def test_counting_equals_rendering_and_both_are_what_transformers_makes(service, tokenizer, processor, name):
    names, fields = CHATS[name]
    parts = [text("What do these show?"), *itertools.chain(*([photo(each), text(" And then?\n")] for each in names))]
    answer = service.render(user(*parts), mm_dtype="float32", **fields)
    counted = service.post("/tokenize", {"messages": user(*parts), **fields}).json
    assert counted["tokens"] == answer["token_ids"]

    made = [processor(images=[Image.open(DATA / each).convert("RGB")], return_tensors="np") for each in names]
    sizes = [int(np.prod(each["image_grid_thw"])) // 4 for each in made]
    plain = [{"role": "user", "content": [part if part["type"] == "text" else {"type": "image"} for part in parts]}]
    pieces = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **fields).split(PAD)
    prompt = pieces[0] + "".join(PAD * size + piece for size, piece in zip(sizes, pieces[1:], strict=True))
    assert answer["token_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    if not names:
        assert answer["features"] is None
        return
    ranges = [(place["offset"], place["length"]) for place in answer["features"]["mm_placeholders"]["image"]]
    assert ranges == tiled(answer["token_ids"], tokenizer.convert_tokens_to_ids(PAD))
    assert [length for _, length in ranges] == sizes
    for element, expected in zip(answer["features"]["kwargs_data"]["image"], made, strict=True):
        fields_of = decode_item(element)
        assert fields_of["pixel_values"].array.tobytes() == np.ascontiguousarray(expected["pixel_values"]).tobytes()
        assert fields_of["image_grid_thw"].array.tolist() == expected["image_grid_thw"][0].tolist()


def grown(service, before):
    """Return how much the counters of queries and hits have grown, which are the same under the engine's names."""
    after = service.metrics()
    told = [
        [
            after[f'{prefix}{name}{{modality="image"}}'] - before[f'{prefix}{name}{{modality="image"}}']
            for name in (QUERIES, HITS)
        ]
        for prefix in ("mmprep_", "vllm:")
    ]
    assert told[0] == told[1]
    return tuple(told[0])


def by_render(service, part):
    assert service.render(user(part, text("?")))["features"]["kwargs_data"]


def by_render_of_ranges(service, part):
    assert service.render(user(part, text("?")), mm_payload="none")["features"]["mm_placeholders"]


def by_tokenize(service, part):
    assert service.post("/tokenize", {"messages": user(part, text("?"))}).json["count"]


def by_native_client(service, part):
    with Client(service.endpoint) as client:
        client.chat(user(part, text("?"))).release()


def by_queue(service, part):
    with Backend(service.endpoint, queue="engine-0", credits=1) as backend:
        assert service.chat(user(part, text("?")), queue="engine-0").status == 202
        backend.pull().ack()


@pytest.mark.parametrize("path", [by_render, by_render_of_ranges, by_tokenize, by_native_client, by_queue])
def test_every_path_counts_a_query_for_each_item_and_a_hit_for_one_that_is_there(service, path):
    part = image(new_picture())
    before = service.metrics()
    path(service, part)
    assert grown(service, before) == (1, 0)
    path(service, part)
    assert grown(service, before) == (2, 1)


def test_an_injected_item_is_a_query_and_a_hit_when_it_is_asked_for_and_not_before(service, tokenizer):
    pad_id = tokenizer.convert_tokens_to_ids(PAD)
    item = {"pixel_values": np.ones((24, 1176), np.uint8), "image_grid_thw": np.array([1, 4, 6])}
    before = service.metrics()
    with Client(service.endpoint) as client:
        told = client.inject("every-path", item, expansion=[pad_id] * 6)
    assert grown(service, before) == (0, 0)
    answer = service.render(user({"type": "image_url", "image_url": None, "uuid": "every-path"}))
    assert answer["features"]["mm_hashes"] == {"image": [told["hash"]]}
    assert grown(service, before) == (1, 1)


def stage(metrics, name):
    return metrics.get(f'mmprep_stage_seconds_count{{stage="{name}"}}', 0)


def test_ranges_and_counting_decode_nothing_and_take_no_room(service):
    service.render(user(photo("cat.png")))
    before, ring = service.metrics(), service.status()["ring"]
    for part in (image(new_picture()), photo("coffee.webp"), photo("cat.png")):
        by_render_of_ranges(service, part)
        by_tokenize(service, part)
    after, later = service.metrics(), service.status()["ring"]
    assert stage(after, "decode") == stage(before, "decode")
    assert (later["entries"], later["evictions"], later["free"]) == (ring["entries"], ring["evictions"], ring["free"])


def test_equal_pictures_of_one_request_are_computed_once(service):
    part = image(new_picture())
    before = service.metrics()
    answer = service.render(user(part, text("and"), part, text("and"), part))
    after = service.metrics()
    features = answer["features"]
    assert len(set(features["mm_hashes"]["image"])) == len(set(features["kwargs_data"]["image"])) == 1
    assert len({place["offset"] for place in features["mm_placeholders"]["image"]}) == 3
    assert stage(after, "decode") - stage(before, "decode") == 1
