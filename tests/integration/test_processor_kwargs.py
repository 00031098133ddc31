"""``mm_processor_kwargs`` through a whole service: values, keys and lengths over both doors, and what is refused."""

import base64
import io
import warnings

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, image, photo, serving, text, user
from tests.models import write_llava15
from transformers import AutoImageProcessor, AutoProcessor

from mmprep import Backend, Client, InvalidRequest, embedded

CAT = (DATA / "cat.png").read_bytes()
MESSAGES = user(text("What is "), photo("cat.png"), text("?"))
CHOICES = [
    {"max_pixels": 28 * 28 * 30},
    {"min_pixels": 28 * 28 * 500},
    {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 60}},
    {"size": {"shortest_edge": 56, "longest_edge": 28 * 28 * 60}, "max_pixels": 28 * 28 * 45},
]


@pytest.fixture(scope="module")
def service():
    options = ("--trust-request-mm-kwargs", "--max-model-len", 1200)
    with serving("--frontends", 1, "--cache-size", "64MiB", *options) as running:
        yield running


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(embedded.path())


def expected(processor, kwargs):
    with warnings.catch_warnings(action="ignore"):  # the former names
        return processor(images=[Image.open(io.BytesIO(CAT)).convert("RGB")], return_tensors="np", **kwargs)


def hash_of(service, kwargs, **fields):
    answer = service.render(MESSAGES, mm_processor_kwargs=kwargs, mm_payload="none", **fields)
    return answer["features"]["mm_hashes"]["image"][0]


@pytest.mark.parametrize("kwargs", CHOICES)
def test_values_and_lengths_are_those_of_transformers_with_the_same_arguments(service, processor, kwargs):
    told = expected(processor, kwargs)
    length = int(np.prod(told["image_grid_thw"])) // 4
    fields = {"mm_processor_kwargs": kwargs, "mm_dtype": "float32"}
    plan = service.render(MESSAGES, mm_payload="none", **fields)
    answer = service.render(MESSAGES, **fields)
    assert answer["token_ids"] == plan["token_ids"]
    assert answer["features"]["mm_hashes"] == plan["features"]["mm_hashes"]
    assert answer["features"]["mm_placeholders"]["image"][0]["length"] == length
    item = decode_item(answer["features"]["kwargs_data"]["image"][0])
    np.testing.assert_array_equal(item["pixel_values"].array, told["pixel_values"], strict=True)
    np.testing.assert_array_equal(item["image_grid_thw"].array, told["image_grid_thw"][0])
    counted = service.post("/tokenize", {"messages": MESSAGES, **fields}).json
    assert counted["tokens"] == answer["token_ids"]
    with Client(service.endpoint) as client:
        parts = [text("What is "), {"type": "image_url", "image_url": {"url": CAT}}, text("?")]
        result = client.chat(user(*parts), payload="tensors", **fields)
        (native,) = result.items["image"]
        assert native.hash == answer["features"]["mm_hashes"]["image"][0]
        np.testing.assert_array_equal(native.materialize()["pixel_values"], told["pixel_values"])
        assert client.tokenize(messages=user(*parts), **fields)["count"] == counted["count"]


def test_other_arguments_are_another_item_and_the_default_ones_are_none(service):
    plain = service.render(MESSAGES, mm_payload="none")["features"]["mm_hashes"]["image"][0]
    hashes = [hash_of(service, kwargs) for kwargs in CHOICES]
    assert len({plain, *hashes}) == len(CHOICES) + 1
    usual = AutoImageProcessor.from_pretrained(embedded.path()).size
    size = {"shortest_edge": usual["shortest_edge"], "longest_edge": usual["longest_edge"]}
    same = [
        {},
        {"size": size},
        {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]},
        {"size": None, "max_pixels": None},
        {"fps": 3, "do_sample_frames": True},  # there is no video
    ]
    for kwargs in same:
        assert hash_of(service, kwargs) == plain
    # An argument by another name, and in another order, is the same one.
    assert (
        hash_of(service, {"size": {"longest_edge": 28 * 28 * 30, "shortest_edge": size["shortest_edge"]}}) == hashes[0]
    )
    assert hash_of(service, CHOICES[0], cache_salt="tenant") not in (plain, hashes[0])


def test_an_item_is_computed_once_for_equal_arguments_and_for_others_again(service):
    with Client(service.endpoint) as client:
        parts = [{"type": "image_url", "image_url": {"url": CAT}}]

        def cached(**kwargs):
            result = client.chat(user(*parts), cache_salt="once", mm_processor_kwargs=kwargs)
            result.release()
            return result.items["image"][0].cached

        assert [cached(max_pixels=90_000), cached(max_pixels=90_000), cached(max_pixels=90_001), cached()] == [
            False,
            True,
            False,
            False,
        ]


def test_addresses_and_names_are_of_the_item_with_these_arguments(service, processor):
    kwargs = {"max_pixels": 28 * 28 * 20}
    alone = user({"type": "image_url", "image_url": None, "uuid": "cat"})
    service.render(user({**image(CAT, "png"), "uuid": "cat"}))
    missing = service.chat(alone, mm_processor_kwargs=kwargs)
    assert (missing.status, missing.error["param"]) == (404, "messages[0].content[0].uuid")
    service.render(user(image(CAT, "png")), mm_processor_kwargs=kwargs)
    with Backend(service.endpoint, id="reader") as backend:
        answer = service.render(alone, mm_processor_kwargs=kwargs, mm_payload="shm", backend_id="reader")
        opened = backend.open(answer["features"]["mm_addresses"]["image"][0])
        pixels = opened.materialize(normalize=True)["pixel_values"]
        opened.release()
    np.testing.assert_array_equal(pixels, expected(processor, kwargs)["pixel_values"])


def test_the_other_apis_take_them_too(service):
    data = base64.b64encode(CAT).decode()
    part = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    messages = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 5}
    url = photo("cat.png")["image_url"]["url"]
    responses = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}
    wanted = hash_of(service, CHOICES[0])
    for path, body in (("/v1/messages/render", messages), ("/v1/responses/render", responses)):
        answer = service.post(path, {**body, "mm_processor_kwargs": CHOICES[0], "mm_payload": "none"})
        assert answer.json["features"]["mm_hashes"]["image"] == [wanted]
        wrong = service.post(path, {**body, "mm_processor_kwargs": {"max_pixels": -1}})
        assert (wrong.status, wrong.error["param"]) == (400, "mm_processor_kwargs.max_pixels")


WRONG = [
    ({"no_such": 1}, "no_such"),
    ({"patch_size": 7}, "patch_size"),
    ({"min_pixels": 0}, "min_pixels"),
    ({"max_pixels": 10**15}, "max_pixels"),
    ({"max_pixels": 10**40}, "max_pixels"),
    ({"max_pixels": "1000"}, "max_pixels"),
    ({"max_pixels": 1e3}, "max_pixels"),
    ({"size": [1, 2]}, "size"),
    ({"size": {"shortest_edge": 5}}, "size"),
    ({"size": {"height": 5, "width": 5}}, "size.height"),
    ({"fps": 0}, "fps"),
    ({"do_sample_frames": "yes"}, "do_sample_frames"),
]


@pytest.mark.parametrize(("kwargs", "place"), WRONG)
def test_what_cannot_be_chosen_is_refused_by_its_place_over_every_path(service, kwargs, place):
    param = f"mm_processor_kwargs.{place}"
    for path, body in (
        ("/v1/chat/completions/render", {"messages": MESSAGES}),
        ("/v1/chat/completions/render", {"messages": MESSAGES, "mm_payload": "none"}),
        ("/tokenize", {"messages": MESSAGES}),
    ):
        answer = service.post(path, {**body, "mm_processor_kwargs": kwargs})
        assert (answer.status, answer.error["type"], answer.error["param"]) == (400, "BadRequestError", param)
    with Client(service.endpoint) as client, pytest.raises(InvalidRequest) as caught:
        client.chat(user({"type": "image_url", "image_url": {"url": CAT}}), mm_processor_kwargs=kwargs)
    assert caught.value.param == param


def test_texts_are_refused_for_them_as_well(service):
    for path, body in (("/v1/completions/render", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        answer = service.post(path, {**body, "mm_processor_kwargs": {"no_such": 1}})
        assert (answer.status, answer.error["param"]) == (400, "mm_processor_kwargs.no_such")
    nan = service.post("/tokenize", b'{"prompt": "a", "mm_processor_kwargs": {"fps": NaN}}')
    assert nan.status == 400
    with Client(service.endpoint) as client:
        for number in (float("nan"), float("inf")):
            with pytest.raises(InvalidRequest) as caught:
                client.chat(MESSAGES, mm_processor_kwargs={"size": {"longest_edge": number}})
            assert caught.value.param == "mm_processor_kwargs.size.longest_edge"


def test_a_prompt_that_a_choice_makes_too_long_is_refused_with_both_numbers(service):
    answer = service.chat(MESSAGES, mm_processor_kwargs={"min_pixels": 28 * 28 * 1250, "max_pixels": 28 * 28 * 1280})
    assert answer.status == 400
    assert "at most 1200" in answer.error["message"]


def test_a_model_behind_its_own_processor_takes_what_that_one_is_configured_by(tmp_path):
    model = write_llava15(tmp_path / "llava")
    kwargs = {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 84}}
    told = AutoProcessor.from_pretrained(model).image_processor(
        images=[Image.open(io.BytesIO(CAT)).convert("RGB")], return_tensors="np", **kwargs
    )
    with serving("--frontends", 1, "--cache-size", "64MiB", "--trust-request-mm-kwargs", model=model) as llava:
        answer = llava.render(MESSAGES, mm_processor_kwargs=kwargs)
        item = decode_item(answer["features"]["kwargs_data"]["image"][0])
        np.testing.assert_array_equal(item["pixel_values"].array, told["pixel_values"][0])
        assert answer["features"]["mm_placeholders"]["image"][0]["length"] == 8 * 6
        assert (
            llava.post("/tokenize", {"messages": MESSAGES, "mm_processor_kwargs": kwargs}).json["tokens"]
            == (answer["token_ids"])
        )
        plain = llava.render(MESSAGES, mm_payload="none")
        assert plain["features"]["mm_hashes"] != answer["features"]["mm_hashes"]
        wrong = llava.chat(MESSAGES, mm_processor_kwargs={"max_pixels": 3136})
        assert (wrong.status, wrong.error["param"]) == (400, "mm_processor_kwargs.max_pixels")
