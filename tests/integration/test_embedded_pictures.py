"""Pictures that come embedded already: their ranges, their tensors in every form of answer, and what is refused."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import decode_item, image, photo, serving, text, user
from tests.models import write_llava15
from transformers import AutoTokenizer

from mmprep import Backend, embedded

PAD = "<|image_pad|>"
WIDTH = json.loads((embedded.path() / "config.json").read_text())["hidden_size"]
GRIDS = [(1, 4, 6), (1, 2, 2)]
ORANGE = "#ff8000"


def npy(array):
    into = io.BytesIO()
    np.save(into, array)
    return base64.b64encode(into.getvalue()).decode()


def rows(grid, dtype="<f4"):
    return np.random.default_rng(sum(grid)).standard_normal((int(np.prod(grid)) // 4, WIDTH)).astype(dtype)


def part(grid, **changes):
    return {
        "type": "image_embeds",
        "image_embeds": {"image_embeds": npy(rows(grid)), "image_grid_thw": list(grid), **changes},
    }


CHAT = user(text("one "), part(GRIDS[0]), text(" two "), part(GRIDS[1]))


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "64MiB", "--image-background", ORANGE) as running:
        yield running


@pytest.fixture(scope="module")
def expected():
    """Return the ids that transformers' template and tokenizer give with as many placeholders as there are rows."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    content = [{"type": "image"} if one["type"] == "image_embeds" else one for one in CHAT[0]["content"]]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    first, second, third = prompt.split(PAD)
    whole = first + PAD * len(rows(GRIDS[0])) + second + PAD * len(rows(GRIDS[1])) + third
    return tokenizer(whole, add_special_tokens=False).input_ids


def check_tensors(elements):
    for grid, element in zip(GRIDS, elements, strict=True):
        fields = decode_item(element)
        assert set(fields) == {"image_embeds", "image_grid_thw"}
        embeds = fields["image_embeds"]
        assert (embeds.dtype, embeds.kind) == ("float32", "flat")
        assert embeds.arguments == {"slices": [[[0, len(rows(grid)), None]]], "dim": 0, "keep_on_cpu": False}
        assert np.array_equal(embeds.array, rows(grid))
        assert fields["image_grid_thw"].array.tolist() == list(grid)


def test_the_range_is_as_long_as_the_embeddings_and_the_tensors_are_theirs(service, expected):
    before = service.metrics()
    answer = service.render(CHAT)
    assert answer["token_ids"] == expected
    features = answer["features"]
    assert [place["length"] for place in features["mm_placeholders"]["image"]] == [6, 1]
    check_tensors(features["kwargs_data"]["image"])
    for grid, element in zip(GRIDS, features["mm_metadata"]["image"], strict=True):
        assert decode_item(element)["image_grid_thw"].array.tolist() == list(grid)
    assert features["mm_addresses"] is None
    assert len({bytes.fromhex(digest) for digest in features["mm_hashes"]["image"]}) == 2
    queries = 'mmprep_mm_cache_queries_total{modality="image"}'
    assert service.metrics().get(queries, 0) == before.get(queries, 0)


def test_hashes_follow_the_content_and_tell_tenants_apart(service):
    def hashes(chat, **fields):
        return service.render(chat, mm_payload="none", **fields)["features"]["mm_hashes"]["image"]

    plain = hashes(CHAT)
    assert hashes(CHAT) == plain
    assert not set(hashes(CHAT, cache_salt="a")) & set(plain)
    other = part((1, 6, 4))
    other["image_embeds"]["image_embeds"] = npy(rows(GRIDS[0]))
    assert hashes(user(other)) != plain[:1]


def test_addresses_are_of_the_same_arrays_and_nothing_travels_where_nothing_was_asked_for(service, expected):
    queries = 'mmprep_mm_cache_queries_total{modality="image"}'
    before = service.metrics().get(queries, 0)
    with Backend(service.endpoint) as backend:
        for _ in range(2):
            features = service.render(CHAT, mm_payload="shm", backend_id=backend.id)["features"]
            assert features["kwargs_data"] is None
            for grid, address in zip(GRIDS, features["mm_addresses"]["image"], strict=True):
                item = backend.open(address)
                arrays = item.materialize()
                item.release()
                assert np.array_equal(arrays["image_embeds"], rows(grid))
                assert arrays["image_grid_thw"].tolist() == list(grid)
    assert service.metrics()[queries] == before + 4
    assert service.status()["ring"]["entries"] == 2
    none = service.render(CHAT, mm_payload="none")
    assert none["token_ids"] == expected
    assert none["features"]["kwargs_data"] is none["features"]["mm_metadata"] is None
    assert service.post("/tokenize", {"messages": CHAT}).json["tokens"] == expected


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([part(GRIDS[0]), photo("cat.png")], "content[1].type"),
        ([photo("cat.png"), part(GRIDS[0])], "content[1].type"),
        ([{"type": "image_embeds", "image_embeds": npy(rows(GRIDS[0]))}], "content[0].image_embeds"),
        ([{"type": "image_embeds", "image_embeds": {"image_embeds": npy(rows(GRIDS[0]))}}], "content[0].image_embeds"),
        ([part(GRIDS[0], more=[1])], "content[0].image_embeds"),
        ([part(GRIDS[0], image_embeds=base64.b64encode(b"\x80\x02}q\x00.").decode())], "content[0].image_embeds"),
        ([part(GRIDS[0], image_embeds="?")], "content[0].image_embeds"),
        ([part(GRIDS[0], image_embeds=npy(np.zeros((6, 3), "<f4")))], "content[0].image_embeds"),
        ([part(GRIDS[0], image_grid_thw=[1, 4, 4])], "content[0].image_embeds"),
        ([part(GRIDS[0], image_grid_thw=[1, 4])], "content[0].image_embeds.image_grid_thw"),
        ([{"type": "image_embeds"}], "content[0].image_embeds"),
        ([part(GRIDS[0])] * 9, "content[8].image_embeds"),
    ],
)
def test_what_the_model_cannot_take_is_refused_at_its_place(service, parts, param):
    answer = service.chat(user(*parts))
    assert answer.status == 400
    assert answer.error["param"] == f"messages[0].{param}"


def test_a_model_whose_card_says_nothing_of_embeddings_refuses_them(tmp_path):
    with serving("--cache-size", "64MiB", "--frontends", "1", model=write_llava15(tmp_path / "llava")) as service:
        error = service.chat(user(part(GRIDS[0]))).error
        assert (error["code"], error["param"]) == (400, "messages[0].content[0].type")


def test_a_transparent_picture_is_seen_on_the_services_background(service):
    pixels = np.random.default_rng(5).integers(0, 256, (56, 84, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", picture.size, ORANGE), picture).convert("RGB")

    def values(of):
        into = io.BytesIO()
        of.save(into, "PNG")
        (element,) = service.render(user(image(into.getvalue(), "png")))["features"]["kwargs_data"]["image"]
        return decode_item(element)["pixel_values"].array.astype(int)

    # Two ways to round what shines through.
    assert np.abs(values(picture) - values(seen)).max() <= 1
    assert np.abs(values(seen) - values(picture.convert("RGB"))).max() > 50
