"""The HTTP door on real pictures: every field of an answer, against transformers and the words of the interface."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, decode_item, image, mmprep, photo, serving, text, user
from tests.models import write_llava15, write_qwen2_vl
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from mmprep import Backend, embedded

PHOTOS = ("astronaut.jpg", "cat.png", "coffee.webp", "rocket.jpg")
PAD = "<|image_pad|>"

GENERATE_REQUEST = {
    "request_id",
    "token_ids",
    "token_offsets",
    "features",
    "content_parts",
    "sampling_params",
    "model",
    "reasoning_ended",
    "reasoning_parser_kwargs",
    "return_token_ids",
    "output_mode",
    "parse_context",
    "stream",
    "stream_options",
    "cache_salt",
    "priority",
    "kv_transfer_params",
    "ec_transfer_params",
}


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "256MiB") as running:
        yield running


class Reference:
    """What transformers makes of a chat, for models whose picture is one placeholder, repeated."""

    def __init__(self, directory, pad, positions):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.processor = AutoImageProcessor.from_pretrained(directory)
        self.pad = pad
        self.pad_id = self.tokenizer.convert_tokens_to_ids(pad)
        self._positions = positions

    def process(self, picture, **options):
        return self.processor(images=[picture], return_tensors="np", **options)

    def positions(self, picture):
        return self._positions(self.process(picture))

    def rendered(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    def token_ids(self, messages, pictures, **options):
        pieces = self.rendered(messages, **options).split(self.pad)
        assert len(pieces) == len(pictures) + 1
        prompt = pieces[0]
        for picture, piece in zip(pictures, pieces[1:], strict=True):
            prompt += self.pad * self.positions(picture) + piece
        return self.tokenizer(prompt, add_special_tokens=False).input_ids


def qwen_positions(processed):
    return int(np.prod(processed["image_grid_thw"])) // 4


@pytest.fixture(scope="module")
def reference():
    return Reference(embedded.path(), PAD, qwen_positions)


def opened(name):
    return Image.open(DATA / name).convert("RGB")


def conversation(names):
    """Return parts with text between and around the pictures."""
    parts = [text("What do these show?")]
    for number, name in enumerate(names):
        parts += [photo(name), text(f" That was number {number}.\n")]
    return user(*parts)


def for_transformers(messages):
    return [
        {
            **message,
            "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]],
        }
        for message in messages
    ]


def check_ranges(answer, modality="image"):
    """Check what holds for every answer with media, and return offsets and lengths."""
    features = answer["features"]
    assert set(features) == {"mm_hashes", "mm_placeholders", "kwargs_data", "mm_metadata", "mm_addresses"}
    ranges = [(place["offset"], place["length"]) for place in features["mm_placeholders"][modality]]
    for name in ("mm_hashes", "mm_placeholders", "kwargs_data", "mm_metadata", "mm_addresses"):
        if features[name] is not None:
            assert set(features[name]) == {modality}
            assert len(features[name][modality]) == len(ranges)
    end = 0
    for offset, length in ranges:
        assert offset >= end
        assert length > 0
        end = offset + length
    assert end <= len(answer["token_ids"])
    for digest in features["mm_hashes"][modality]:
        assert len(bytes.fromhex(digest)) == 32
    return ranges


def arrays_of(element):
    return {name: field.array for name, field in decode_item(element).items()}


# --- one chat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("payload", ["tensors", "shm", "none"])
def test_a_chat_with_pictures_becomes_the_ids_and_ranges_that_transformers_gives(service, reference, payload, count):
    names = PHOTOS[:count]
    messages = conversation(names)
    with Backend(service.endpoint, id="reader") as backend:
        fields = {"backend_id": backend.id} if payload == "shm" else {}
        answer = service.render(messages, mm_payload=payload, **fields)
    assert set(answer) == GENERATE_REQUEST
    assert answer["request_id"].startswith("chatcmpl-")
    assert answer["model"] == "mmprep-demo"
    assert answer["sampling_params"] == {"max_tokens": 32768 - len(answer["token_ids"])}
    assert (answer["stream"], answer["priority"], answer["output_mode"]) == (False, 0, "tokens")
    pictures = [opened(name) for name in names]
    assert answer["token_ids"] == reference.token_ids(for_transformers(messages), pictures)
    ranges = check_ranges(answer)
    assert [length for _, length in ranges] == [reference.positions(picture) for picture in pictures]
    covered = [index for offset, length in ranges for index in range(offset, offset + length)]
    assert covered == [index for index, token in enumerate(answer["token_ids"]) if token == reference.pad_id]
    assert all("is_embed" not in place for place in answer["features"]["mm_placeholders"]["image"])
    given = {name: answer["features"][name] is not None for name in ("kwargs_data", "mm_metadata", "mm_addresses")}
    assert given == {
        "kwargs_data": payload == "tensors",
        "mm_metadata": payload != "none",
        "mm_addresses": payload == "shm",
    }


def test_tensors_are_encoded_as_the_interface_says_and_uint8_by_default(service, reference):
    features = service.render(conversation(PHOTOS))["features"]
    elements = zip(PHOTOS, features["kwargs_data"]["image"], features["mm_metadata"]["image"], strict=True)
    for name, element, metadata in elements:
        fields = decode_item(element)
        assert set(fields) == {"pixel_values", "image_grid_thw"}
        grid, pixels = fields["image_grid_thw"], fields["pixel_values"]
        expected = reference.process(opened(name), do_rescale=False, do_normalize=False)
        assert (grid.dtype, grid.kind, grid.arguments) == ("int64", "batched", {"keep_on_cpu": True})
        assert np.array_equal(grid.array, expected["image_grid_thw"][0])
        rows = int(np.prod(grid.array))
        assert pixels.array.shape == (rows, 1176)
        assert (pixels.dtype, pixels.kind) == ("uint8", "flat")
        assert pixels.arguments == {"slices": [[[0, rows, None]]], "dim": 0, "keep_on_cpu": False}
        assert np.array_equal(pixels.array, expected["pixel_values"].astype(np.uint8))
        kept = decode_item(metadata)
        assert set(kept) == {"image_grid_thw"}
        assert np.array_equal(kept["image_grid_thw"].array, grid.array)


def rounded_to_bfloat16(values):
    """Return float32 rounded to nearest even, as the upper 16 bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("dtype", "convert"),
    [
        ("float32", lambda values: values),
        ("bfloat16", rounded_to_bfloat16),
        ("float16", lambda values: values.astype(np.float16)),
    ],
)
def test_float_pixels_equal_transformers_to_the_bit(service, reference, dtype, convert):
    answer = service.render(conversation(PHOTOS), mm_dtype=dtype)
    for name, element in zip(PHOTOS, answer["features"]["kwargs_data"]["image"], strict=True):
        field = decode_item(element)["pixel_values"]
        expected = convert(np.ascontiguousarray(reference.process(opened(name))["pixel_values"]))
        assert field.dtype == dtype
        assert field.array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_that_is_read_gives_the_pixels_that_transformers_sees(service, reference, kind):
    into = io.BytesIO()
    opened("coffee.webp").resize((320, 200)).save(into, kind)
    answer = service.render(user(image(into.getvalue(), kind.lower()), text("?")), mm_dtype="float32")
    expected = reference.process(Image.open(io.BytesIO(into.getvalue())))
    pixels = decode_item(answer["features"]["kwargs_data"]["image"][0])["pixel_values"].array
    assert pixels.tobytes() == np.ascontiguousarray(expected["pixel_values"]).tobytes()


def test_addresses_hold_the_tensors_that_come_inline_too(service):
    messages = conversation(PHOTOS)
    inline = service.render(messages)["features"]["kwargs_data"]["image"]
    with Backend(service.endpoint) as backend:
        answer = service.render(messages, mm_payload="shm", backend_id=backend.id)
        for address, element in zip(answer["features"]["mm_addresses"]["image"], inline, strict=True):
            assert {"segment", "epoch", "slot", "offset", "length", "generation", "fields", "lease"} <= set(address)
            item = backend.open(address)
            arrays, expected = item.materialize(), arrays_of(element)
            item.release()
            assert set(arrays) == set(expected)
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)


def test_hashes_are_stable_and_the_same_whatever_the_payload(service):
    messages = conversation(PHOTOS)
    with Backend(service.endpoint) as backend:
        answers = [
            service.render(messages, mm_payload="none"),
            service.render(messages, return_mm_kwargs=False),
            service.render(messages, mm_payload="tensors"),
            service.render(messages, mm_payload="shm", backend_id=backend.id),
            service.render(messages),
        ]
    hashes = [answer["features"]["mm_hashes"] for answer in answers]
    assert all(found == hashes[0] for found in hashes)
    assert len(set(hashes[0]["image"])) == len(PHOTOS)


def test_counting_looks_where_rendering_with_the_same_salt_and_dtype_would(service):
    pixels = np.random.default_rng(7).integers(0, 256, (90, 120, 3), np.uint8)
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, "PNG")
    messages = user(image(into.getvalue(), "png"), text("How long?"))

    def found(**fields):
        """Tell whether the picture was known, under the key of these fields."""
        name = 'mmprep_mm_cache_hits_total{modality="image"}'
        before = service.metrics().get(name, 0)
        assert service.post("/tokenize", {"messages": messages, **fields}).status == 200
        return service.metrics().get(name, 0) > before

    service.render(messages, mm_payload="none", cache_salt="tenant", mm_dtype="float32")
    assert not found()
    assert not found(cache_salt="tenant")
    assert not found(mm_dtype="float32")
    assert found(cache_salt="tenant", mm_dtype="float32")
    assert found(cache_salt="tenant")
    assert service.post("/tokenize", {"messages": messages, "mm_dtype": "int4"}).error["param"] == "mm_dtype"


def test_dtype_salt_and_content_change_a_hash_and_the_place_in_the_chat_does_not(service):
    def of(name, *before, **fields):
        answer = service.render(user(*before, photo(name), text("?")), mm_payload="none", **fields)
        return answer["features"]["mm_hashes"]["image"][-1]

    plain = of("cat.png")
    assert of("cat.png", photo("rocket.jpg"), text("before")) == plain
    assert of("cat.png", mm_dtype="uint8") == plain
    others = {of("rocket.jpg"), of("cat.png", mm_dtype="float32"), of("cat.png", cache_salt="a")}
    assert len(others | {plain}) == 4
    assert of("cat.png", cache_salt="a") in others
    assert of("cat.png", cache_salt="b") not in others | {plain}


def test_the_same_picture_twice_is_two_items_with_one_hash(service):
    answer = service.render(user(photo("cat.png"), text("and"), photo("cat.png")))
    first, second = answer["features"]["mm_hashes"]["image"]
    assert first == second
    assert len(check_ranges(answer)) == 2


def test_a_chat_of_several_turns_keeps_the_order_of_its_pictures(service, reference):
    turns = [
        {"role": "system", "content": "Be brief."},
        *user(photo("rocket.jpg"), text("Where?")),
        {"role": "assistant", "content": "On a pad."},
        *user(text("And this?"), photo("cat.png"), photo("astronaut.jpg")),
    ]
    for_reference = [turns[0], for_transformers([turns[1]])[0], turns[2], for_transformers([turns[3]])[0]]
    answer = service.render(turns)
    pictures = [opened(name) for name in ("rocket.jpg", "cat.png", "astronaut.jpg")]
    assert answer["token_ids"] == reference.token_ids(for_reference, pictures)
    for element, picture in zip(answer["features"]["kwargs_data"]["image"], pictures, strict=True):
        grid = reference.process(picture)["image_grid_thw"][0]
        assert np.array_equal(arrays_of(element)["image_grid_thw"], grid)


def test_input_image_parts_and_urls_without_an_object_are_pictures_too(service):
    url = photo("cat.png")["image_url"]["url"]
    forms = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
    ]
    answers = [service.render(user(form, text("?"))) for form in forms]
    assert all(answer["features"] == answers[0]["features"] for answer in answers)


def test_a_chat_without_media_has_no_features(service, reference):
    messages = [{"role": "user", "content": "Say hello."}]
    for payload in ("tensors", "none"):
        answer = service.render(messages, mm_payload=payload)
        assert answer["features"] is None
        assert answer["token_ids"] == reference.token_ids(messages, [])


def test_a_typed_placeholder_stays_text_and_shifts_nothing(service, reference):
    messages = user(text(f"I typed {PAD} here"), photo("cat.png"), text(f"and {PAD}{PAD} there"))
    answer = service.render(messages)
    ((offset, length),) = check_ranges(answer)
    picture = opened("cat.png")
    assert length == reference.positions(picture)
    assert set(answer["token_ids"][offset : offset + length]) == {reference.pad_id}
    around = answer["token_ids"][:offset] + answer["token_ids"][offset + length :]
    assert reference.pad_id not in around
    shown = reference.tokenizer.decode(around)
    assert f"I typed {PAD} here" in shown
    assert f"and {PAD}{PAD} there" in shown
    alone = service.render([{"role": "user", "content": f"only {PAD}"}])
    assert alone["features"] is None
    assert reference.pad_id not in alone["token_ids"]


def test_what_a_request_says_of_sampling_delivery_and_streaming_is_handed_on(service):
    answer = service.render(
        [{"role": "user", "content": "Hi"}],
        model="mmprep-demo",
        temperature=0.5,
        top_p=0.9,
        max_tokens=7,
        stop=["x"],
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
        cache_salt="pepper",
        priority=4,
        kv_transfer_params={"a": 1},
        return_token_ids=True,
        return_prompt_text=True,
    )
    assert set(answer) == GENERATE_REQUEST | {"prompt_text"}
    assert answer["sampling_params"] == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["x"], "seed": 3}
    assert answer["stream"] is True
    assert answer["stream_options"] == {"include_usage": True}
    assert (answer["cache_salt"], answer["priority"], answer["kv_transfer_params"]) == ("pepper", 4, {"a": 1})
    assert answer["return_token_ids"] is True


def test_the_prompt_text_shows_the_template_as_its_users_know_it(service, reference):
    messages = user(photo("cat.png"), text("What?"))
    answer = service.render(messages, return_prompt_text=True)
    assert answer["prompt_text"] == reference.rendered(for_transformers(messages))


def test_tools_and_template_arguments_reach_the_template(service, reference):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    messages = user(photo("cat.png"), text("Look it up"))
    answer = service.render(messages, tools=tools, chat_template_kwargs={"add_vision_id": True})
    expected = reference.token_ids(for_transformers(messages), [opened("cat.png")], tools=tools, add_vision_id=True)
    assert answer["token_ids"] == expected


# --- the other routes -------------------------------------------------------------------------------------------------


def test_tokenize_gives_the_tokens_of_render_and_detokenize_takes_them_back(service, reference):
    messages = conversation(PHOTOS)
    rendered = service.render(messages, mm_payload="none")["token_ids"]
    answer = service.post("/tokenize", {"messages": messages, "return_token_strs": True}).json
    assert set(answer) == {"count", "max_model_len", "tokens", "token_strs"}
    assert answer["tokens"] == rendered
    assert (answer["count"], answer["max_model_len"]) == (len(rendered), 32768)
    assert answer["token_strs"] == reference.tokenizer.convert_ids_to_tokens(rendered)
    back = service.post("/detokenize", {"tokens": rendered}).json
    assert back == {"prompt": reference.tokenizer.decode(rendered)}


def test_plain_text_is_tokenized_as_transformers_does(service, reference):
    for words in ("Hello, wörld! 你好", "<|im_start|>system"):
        answer = service.post("/tokenize", {"prompt": words}).json
        assert answer["tokens"] == reference.tokenizer(words).input_ids
        assert answer["token_strs"] is None


def test_completions_take_text_texts_ids_and_lists_of_ids(service, reference):
    ids = reference.tokenizer("Once upon a time").input_ids
    other = reference.tokenizer("The end").input_ids
    for prompt, expected in (
        ("Once upon a time", [ids]),
        (["Once upon a time", "The end"], [ids, other]),
        (ids, [ids]),
        ([ids, other], [ids, other]),
    ):
        answers = service.post("/v1/completions/render", {"prompt": prompt}).json
        assert [answer["token_ids"] for answer in answers] == expected
        assert all(set(answer) == GENERATE_REQUEST for answer in answers)
        assert all(answer["features"] is None for answer in answers)
        assert all(answer["sampling_params"] == {"max_tokens": 16} for answer in answers)
        names = [answer["request_id"] for answer in answers]
        assert all(name.startswith("cmpl-") for name in names)
        if prompt is not ids and isinstance(prompt, list):
            assert [name.rpartition("-")[2] for name in names] == ["0", "1"]


def test_models_version_health_and_ready_answer(service):
    (model,) = service.get("/v1/models").json["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("mmprep-demo", "model", 32768)
    assert service.get("/health").status == 200
    assert service.get("/ready").status == 200
    said = mmprep("--version").stdout.split()[1]
    assert service.get("/version").json == {"version": said}


def test_a_request_id_that_the_client_chose_comes_back(service):
    answer = service.post("/v1/chat/completions/render", {"messages": user(text("?"))}, X_Request_Id="mine-7")
    assert answer.headers["X-Request-Id"] == "mine-7"
    assert answer.json["request_id"] == "chatcmpl-mine-7"


def test_metrics_count_for_all_frontends_whichever_is_asked(service):
    before = service.metrics()
    hit = user(photo("galaxies.jpg"), text("?"))
    for _ in range(12):
        service.render(hit, mm_payload="tensors")
    after = service.metrics()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('mmprep_mm_cache_queries_total{modality="image"}') == 12
    assert grown('mmprep_mm_cache_hits_total{modality="image"}') == 11
    assert grown('vllm:mm_cache_queries_total{modality="image"}') == 12
    assert grown('vllm:mm_cache_hits_total{modality="image"}') == 11
    assert grown('mmprep_requests_total{outcome="ok",path="/v1/chat/completions/render"}') == 12
    assert grown('mmprep_request_seconds_count{path="/v1/chat/completions/render"}') == 12
    assert grown('mmprep_stage_seconds_count{stage="decode"}') == 1
    names = Counter(name.partition("{")[0] for name in after)
    for name in ("mmprep_ring_bytes", "mmprep_leases", "mmprep_lanes", "mmprep_queue_depth", "mmprep_inflight"):
        assert names[name], name


STAGES = ("fetch", "hash", "template", "tokenize", "queue", "decode", "process", "publish", "expand", "serialize")
#: Stages of the disk cache, which this service does not have.
CACHE_STAGES = ("cache_lookup", "cache_read", "cache_write")


def test_each_stage_is_counted_where_it_happens_and_the_help_names_those_that_do(service):
    def counts():
        metrics = service.metrics()
        return [metrics.get(f'mmprep_stage_seconds_count{{stage="{stage}"}}', 0) for stage in STAGES]

    def grown(call):
        before = counts()
        call()
        return [int(after - earlier) for after, earlier in zip(counts(), before, strict=True)]

    into = io.BytesIO()
    Image.fromarray(np.random.default_rng(8).integers(0, 256, (70, 90, 3), np.uint8)).save(into, "PNG")
    parts = (image(into.getvalue(), "png"), photo("cat.png"), text("Which stage is this?"))
    service.render(user(photo("cat.png"), text("?")))
    # one new picture and one known, and a new text
    assert grown(lambda: service.render(user(*parts))) == [0, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert grown(lambda: service.post("/tokenize", {"prompt": "a text"})) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert grown(lambda: service.post("/v1/completions/render", {"prompt": "a text"})) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert grown(lambda: service.post("/detokenize", {"tokens": [1, 2]})) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    lines = service.get("/metrics").body.decode().splitlines()
    (line,) = (line for line in lines if line.startswith("# HELP mmprep_stage_seconds "))
    named = (STAGES[0], *CACHE_STAGES, *STAGES[1:])
    assert line.endswith(f": {', '.join(named)}.")


# --- other models -----------------------------------------------------------------------------------------------------


def test_llava_15_runs_through_its_own_processor(tmp_path):
    directory = write_llava15(tmp_path / "llava-1.5-test")
    reference = Reference(directory, "<image>", lambda _: 576)
    processor = AutoProcessor.from_pretrained(directory)
    messages = conversation(PHOTOS[:3])
    pictures = [opened(name) for name in PHOTOS[:3]]
    with serving("--cache-size", "64MiB", "--frontends", "1", model=directory) as service:
        answer = service.render(messages, model="llava-1.5-test", add_special_tokens=True)
        shown = service.post("/tokenize", {"messages": messages, "add_special_tokens": True}).json
        none = service.render(messages, mm_payload="none", add_special_tokens=True)
        assert service.mapping("libtorch") == []  # transformers would take other code where there is torch
    whole = processor(text=reference.rendered(for_transformers(messages)), images=pictures, return_tensors="np")
    assert answer["token_ids"] == whole["input_ids"][0].tolist() == shown["tokens"] == none["token_ids"]
    assert answer["features"]["mm_hashes"] == none["features"]["mm_hashes"]
    ranges = check_ranges(answer)
    assert [length for _, length in ranges] == [576, 576, 576]
    assert Counter(answer["token_ids"])[reference.pad_id] == 3 * 576
    for element, picture in zip(answer["features"]["kwargs_data"]["image"], pictures, strict=True):
        fields = decode_item(element)
        assert set(fields) == {"pixel_values"}
        pixels = fields["pixel_values"]
        assert (pixels.kind, pixels.arguments, pixels.dtype) == ("batched", {"keep_on_cpu": False}, "float32")
        assert pixels.array.tobytes() == np.ascontiguousarray(reference.process(picture)["pixel_values"][0]).tobytes()


def test_qwen25_vl_runs_with_its_published_sizes(tmp_path):
    directory = write_qwen2_vl(tmp_path / "qwen25", qwen25=True)
    reference = Reference(directory, PAD, qwen_positions)
    messages = conversation(PHOTOS[:2])
    with serving("--cache-size", "64MiB", "--frontends", "1", model=directory) as service:
        answer = service.render(messages, mm_dtype="float32")
        (model,) = service.get("/v1/models").json["data"]
    assert (model["id"], model["max_model_len"]) == ("qwen25", 128000)
    assert answer["token_ids"] == reference.token_ids(for_transformers(messages), [opened(n) for n in PHOTOS[:2]])
    for name, element in zip(PHOTOS, answer["features"]["kwargs_data"]["image"], strict=False):
        pixels = decode_item(element)["pixel_values"].array
        assert pixels.tobytes() == np.ascontiguousarray(reference.process(opened(name))["pixel_values"]).tobytes()
