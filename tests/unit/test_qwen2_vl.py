"""The Qwen2-VL family equals transformers' own processor to the bit, and refuses what that one would get wrong."""

import importlib.metadata
import io
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import QWEN2_VL, QWEN3_VL, limits, write_json, write_qwen2_vl
from PIL import Image, ImageOps, features
from tests.pictures import samples
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from mmprep.arguments import choose
from mmprep.card import ItemOptions
from mmprep.errors import DecodeError, InvalidRequest, MmprepError, StartupError, TooLarge, UnsupportedMedia
from mmprep.items import storage_dtype, unpack_meta
from mmprep_worker.images.resample import PillowResampler
from mmprep_worker.models import registry
from mmprep_worker.models.qwen2_vl import Qwen2VLFamily
from mmprep_worker.models.qwen2_vl_settings import embeds_width, read_settings, smart_resize
from mmprep_worker.models.registry import load_family

LIMIT = 178_956_970
RANDOM = np.random.default_rng(11)
#: Small pictures of any shape, and a maximum that the large ones of the tests exceed.
SMALL = {**QWEN2_VL, "max_pixels": 1_003_520}


def drawn(width, height):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2)
    noise = RANDOM.integers(-40, 40, smooth.shape, dtype=np.int8)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def processed(family, data, dtype="float32"):
    prepared = family.open("image", data, ItemOptions(dtype))
    tensors = {spec.name: np.full(spec.shape, 77, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    return prepared.meta, tensors


def assert_equals_transformers(family, processor, data):
    meta, tensors = processed(family, data)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = processor(images=[image], return_tensors="np")
    assert np.array_equal(tensors["image_grid_thw"], expected["image_grid_thw"][0])
    assert tensors["pixel_values"].tobytes() == np.ascontiguousarray(expected["pixel_values"]).tobytes()
    assert meta.plan.length == int(np.prod(expected["image_grid_thw"])) // 4
    assert family.plan("image", data, ItemOptions("float32")) == meta.plan


#: What a request may send, and what of it is a choice: SMALL is the configuration.
CHOICES = [
    ({"max_pixels": 50_000}, {"size.longest_edge": 50_000}),
    ({"min_pixels": 400_000}, {"size.shortest_edge": 400_000}),
    ({"min_pixels": 100, "max_pixels": 2_000}, {"size.longest_edge": 2_000, "size.shortest_edge": 100}),
    (
        {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 40}},
        {"size.longest_edge": 28 * 28 * 40},
    ),
    (
        {"size": {"shortest_edge": 90_000, "longest_edge": 200_000}, "max_pixels": 150_000},
        {"size.longest_edge": 150_000, "size.shortest_edge": 90_000},
    ),
    # Less than the configured least: the reference enlarges what is small, and makes what is large smaller.
    ({"max_pixels": 1}, {"size.longest_edge": 1}),
    ({"max_pixels": 5_000_000}, {"size.longest_edge": 5_000_000}),
]


@pytest.mark.parametrize(("kwargs", "chosen"), CHOICES)
@pytest.mark.parametrize("size", [(640, 480), (30, 45), (1500, 1100)])
def test_what_a_request_chooses_is_done_as_transformers_does_it(family, processor, kwargs, chosen, size):
    packed = choose(family.card.arguments, kwargs, {"image"})["image"]
    assert json.loads(packed) == chosen
    image = drawn(*size)
    with warnings.catch_warnings(action="ignore"):  # the former names
        expected = processor(images=[image], return_tensors="np", **kwargs)
    options = ItemOptions("float32", kwargs=packed)
    prepared = family.open("image", encoded(image), options)
    tensors = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    assert np.array_equal(tensors["image_grid_thw"], expected["image_grid_thw"][0])
    assert tensors["pixel_values"].tobytes() == np.ascontiguousarray(expected["pixel_values"]).tobytes()
    assert prepared.meta.plan.length == int(np.prod(expected["image_grid_thw"])) // 4
    assert family.plan("image", encoded(image), options) == prepared.meta.plan


def test_a_request_makes_no_more_of_a_small_picture_than_the_configuration_of_a_large_one(family):
    arguments = family.card.arguments
    choose(arguments, {"min_pixels": SMALL["max_pixels"], "max_pixels": LIMIT}, {"image"})
    for kwargs in ({"min_pixels": SMALL["max_pixels"] + 1}, {"max_pixels": LIMIT + 1}):
        with pytest.raises(InvalidRequest) as caught:
            choose(arguments, kwargs, {"image"})
        assert caught.value.param == f"mm_processor_kwargs.{next(iter(kwargs))}"
    with pytest.raises(InvalidRequest):
        family.open("image", encoded(drawn(9, 9)), ItemOptions("uint8", kwargs=b'{"size.shortest_edge":99999999}'))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_vl")
    write_qwen2_vl(directory, processor=SMALL)
    return directory


@pytest.fixture(scope="module")
def family(model):
    return load_family(model, limits(LIMIT))


@pytest.fixture(scope="module")
def processor(model):
    return AutoImageProcessor.from_pretrained(model)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 200), (200, 1), (27, 29), (28, 28), (640, 480), (1333, 777), (1920, 1080), (4032, 3024), (3, 500)],
)
def test_sizes_equal_transformers(family, processor, size):
    assert_equals_transformers(family, processor, encoded(drawn(*size), compress_level=1))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data, id=" ".join(key))
        for key, data in samples().items()
        if ("16-bit grey" not in key[1] or "alpha" in key[1])
    ],
)
def test_every_format_and_mode_equals_transformers(family, processor, data):
    with warnings.catch_warnings(action="ignore"):
        assert_equals_transformers(family, processor, data)


@pytest.mark.parametrize("background", [None, (0, 0, 0), (12, 200, 99)])
@pytest.mark.parametrize("key", [("PNG", "RGBA"), ("PNG", "palette, all translucent"), ("GIF", "transparent")])
def test_another_background_equals_transformers_on_the_picture_without_transparency(model, processor, background, key):
    rgba = Image.open(io.BytesIO(samples()[key])).convert("RGBA")
    opaque = rgba if background is None else Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba)
    expected = processor(images=[opaque.convert("RGB")], return_tensors="np")["pixel_values"]
    other = load_family(model, limits(LIMIT), background=background)
    assert np.array_equal(processed(other, samples()[key])[1]["pixel_values"], expected)


def test_deep_grey_equals_transformers_given_its_high_byte(family, processor):
    values = RANDOM.integers(0, 65536, (90, 131)).astype("<u2")
    _, tensors = processed(family, encoded(Image.frombytes("I;16", (131, 90), values.tobytes())))
    expected = processor(images=[Image.fromarray((values >> 8).astype(np.uint8))], return_tensors="np")
    assert tensors["pixel_values"].tobytes() == np.ascontiguousarray(expected["pixel_values"]).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_equal_transformers_on_the_upright_picture(family, processor, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    assert_equals_transformers(family, processor, encoded(drawn(200, 90), "JPEG", exif=tags))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 900), st.integers(1, 900))
def test_any_size_equals_transformers_or_is_refused_as_there(family, processor, width, height):
    data = encoded(drawn(width, height), "BMP")
    if max(width, height) / min(width, height) <= 200:
        assert_equals_transformers(family, processor, data)
        return
    with pytest.raises(InvalidRequest, match="at most 200 times"):
        family.open("image", data, ItemOptions("uint8"))


@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (50, 900)])
def test_qwen3_vl_equals_transformers(tmp_path, size):
    write_qwen2_vl(tmp_path, "qwen3_vl", QWEN3_VL)
    three = load_family(tmp_path, limits(LIMIT))
    assert_equals_transformers(three, AutoImageProcessor.from_pretrained(tmp_path), encoded(drawn(*size)))


@pytest.mark.parametrize("size", [(640, 480), (1333, 777), (27, 400)])
def test_uint8_is_the_resized_picture_in_the_same_layout(family, size):
    image = drawn(*size)
    meta, tensors = processed(family, encoded(image), "uint8")
    height, width = reference_resize(size[1], size[0], max_pixels=SMALL["max_pixels"])
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows = tensors["pixel_values"].reshape(-1, 3, 2, 14, 14)
    assert len(rows) == height * width // 14**2
    patch = 0
    for y in range(0, height, 28):
        for x in range(0, width, 28):
            for top, left in ((y, x), (y, x + 14), (y + 14, x), (y + 14, x + 14)):
                cut = resized[top : top + 14, left : left + 14].transpose(2, 0, 1)
                assert np.array_equal(rows[patch, :, 0], cut)
                assert np.array_equal(rows[patch, :, 1], cut)
                patch += 1
    normalization = meta.normalization
    pixels = tensors["pixel_values"].reshape(-1, 3, normalization.run)
    scaled = (pixels.astype(np.float64) * normalization.scale).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (normalization.mean, normalization.std))
    exact = processed(family, encoded(image))[1]["pixel_values"]
    assert ((scaled - mean) / std).reshape(exact.shape).tobytes() == exact.tobytes()


def test_narrow_types_are_float32_rounded(family):
    data = encoded(drawn(333, 222))
    exact = processed(family, data)[1]["pixel_values"]
    half = processed(family, data, "float16")[1]["pixel_values"]
    assert half.tobytes() == exact.astype(np.float16).tobytes()
    brain = processed(family, data, "bfloat16")[1]["pixel_values"]
    bits = exact.view(np.uint32)
    low, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (low & 1 == 1))
    assert np.array_equal(brain, (low + up).astype(np.uint16))


def test_pillow_in_place_of_the_kernel_gives_the_same_bits(model):
    other = load_family(model, limits(LIMIT))
    data = encoded(drawn(640, 481))
    kernel = {dtype: processed(other, data, dtype)[1]["pixel_values"] for dtype in other.card.dtypes["image"]}
    other.resampler = PillowResampler()
    for dtype, pixels in kernel.items():
        assert processed(other, data, dtype)[1]["pixel_values"].tobytes() == pixels.tobytes()


def test_the_metadata_describes_the_item(family):
    meta, tensors = processed(family, encoded(drawn(640, 480)), "bfloat16")
    assert unpack_meta(meta.pack()) == meta
    pixels, grid = meta.fields
    assert (pixels.name, pixels.dtype, pixels.shape, pixels.kind) == ("pixel_values", "bfloat16", (1564, 1176), "flat")
    assert (grid.name, grid.dtype, grid.shape, grid.kind, grid.keep_on_cpu) == (
        "image_grid_thw",
        "int64",
        (3,),
        "batched",
        True,
    )
    assert meta.cpu == {"image_grid_thw": tensors["image_grid_thw"].tobytes()}
    assert meta.plan.is_embed() is None
    assert meta.plan.token_ids() == [family.card.placeholder("image").token_id] * 391


def test_the_card_names_the_placeholder_and_the_constants(family):
    placeholder = family.card.placeholder("image")
    assert placeholder.token == "<|image_pad|>"
    assert placeholder.part_text == "<|vision_start|><|image_pad|><|vision_end|>"
    assert family.card.dtypes["image"][0] == "uint8"
    assert family.card.normalization["image"].run == 392


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smart_resize_equals_transformers(height, width):
    chosen = read_settings(QWEN2_VL)
    try:
        expected = reference_resize(height, width, 28, chosen.min_pixels, chosen.max_pixels)
    except ValueError:
        with pytest.raises(InvalidRequest):
            smart_resize(height, width, chosen)
        return
    assert smart_resize(height, width, chosen) == expected


def test_errors_say_what_to_change(family):
    ok = ItemOptions("uint8")
    with pytest.raises(InvalidRequest, match="2000 times the other"):
        family.plan("image", encoded(Image.new("L", (2000, 1))), ok)
    with pytest.raises(InvalidRequest, match="uint8, float32, bfloat16, float16"):
        family.open("image", encoded(drawn(8, 8)), ItemOptions("int4"))
    with pytest.raises(InvalidRequest, match="not audio"):
        family.open("audio", b"", ok)
    with pytest.raises(UnsupportedMedia):
        family.open("image", b"", ok)
    truncated = encoded(drawn(300, 300), "JPEG")[:-4000]
    prepared = family.open("image", truncated, ok)
    tensors = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    with pytest.raises(DecodeError):
        prepared.fill(tensors)


def test_the_limit_of_pixels_is_the_servers(model):
    with pytest.raises(TooLarge, match="--max-image-pixels"):
        load_family(model, limits(99)).open("image", encoded(drawn(10, 10)), ItemOptions("uint8"))


def test_settings_follow_both_spellings_and_the_defaults():
    defaults = read_settings({})
    assert (defaults.min_pixels, defaults.max_pixels, defaults.patch) == (3136, 1003520, 14)
    assert read_settings({"min_pixels": 5000, "size": {"shortest_edge": 1, "longest_edge": 9000}}).min_pixels == 5000
    assert read_settings(QWEN3_VL).max_pixels == 16777216


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"do_center_crop": True},
        {"do_pad": True},
        {"resample": 2},
        {"size": {"height": 3, "width": 4}, "min_pixels": None, "max_pixels": None},
        {"size": 448, "min_pixels": None},
        {"image_mean": 0.5},
        {"patch_size": 0},
        {"image_processor_type": "CLIPImageProcessor"},
    ],
)
def test_settings_that_cannot_be_honoured_are_not_taken(change):
    assert read_settings({**QWEN2_VL, **change}) is None


def test_a_section_of_the_processors_file_wins(tmp_path):
    write_qwen2_vl(tmp_path)
    write_json(tmp_path / "processor_config.json", {"image_processor": {**QWEN2_VL, "max_pixels": 50_000}})
    both = load_family(tmp_path, limits(LIMIT))
    assert isinstance(both, Qwen2VLFamily)
    assert both.settings.max_pixels == 50_000


def test_tokens_are_found_by_name_where_the_configuration_leaves_them_out(tmp_path):
    ids = write_qwen2_vl(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "qwen2_5_vl"})
    (tmp_path / "tokenizer.json").unlink()
    added = {str(number): {"content": token} for token, number in ids.items()}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added})
    named = load_family(tmp_path, limits(LIMIT))
    assert named.card.placeholder("image").token_id == ids["<|image_pad|>"]


def test_the_fingerprint_changes_with_the_configuration_and_not_with_a_limit(model, family, tmp_path):
    assert load_family(model, limits(5)).card.fingerprint == family.card.fingerprint
    write_qwen2_vl(tmp_path)
    assert load_family(tmp_path, limits(LIMIT)).card.fingerprint != family.card.fingerprint


def test_the_fingerprint_changes_with_the_background(model, family):
    backgrounds = [(255, 255, 255), (255, 255, 254), (0, 0, 0), None]
    found = [load_family(model, limits(LIMIT), background=one).card.fingerprint for one in backgrounds]
    assert len(set(found)) == len(backgrounds)
    assert found[0] == family.card.fingerprint


@pytest.mark.parametrize("name", ["transformers", "pillow", "simplejpeg", "numpy"])
def test_the_fingerprint_changes_with_the_version_of_a_package_that_decides_over_pixels(
    model, family, name, monkeypatch
):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "0.0" if asked == name else version(asked))
    assert load_family(model, limits(LIMIT)).card.fingerprint != family.card.fingerprint


@pytest.mark.parametrize("name", ["libjpeg_turbo", "webp", "avif", "libtiff"])
def test_the_fingerprint_changes_with_the_version_of_a_library_below_pillow(model, family, name, monkeypatch):
    version = features.version
    monkeypatch.setattr(features, "version", lambda asked: "0.0" if asked == name else version(asked))
    assert load_family(model, limits(LIMIT)).card.fingerprint != family.card.fingerprint


@pytest.mark.parametrize("name", ["DECODER_VERSION", "KERNEL_VERSION"])
def test_the_fingerprint_changes_with_our_own_code(model, family, name, monkeypatch):
    monkeypatch.setattr(registry, name, 99)
    assert load_family(model, limits(LIMIT)).card.fingerprint != family.card.fingerprint


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_or_broken_file_is_named_at_the_start(tmp_path, name):
    write_qwen2_vl(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(StartupError, match=name) as caught:
        load_family(tmp_path, limits(LIMIT))
    assert str(tmp_path.parent) not in caught.value.message
    (tmp_path / name).write_text("[]")
    with pytest.raises(StartupError, match=name):
        load_family(tmp_path, limits(LIMIT))
    (tmp_path / name).unlink()
    with pytest.raises(MmprepError):
        load_family(tmp_path, limits(LIMIT))


def test_a_missing_directory_is_named_at_the_start(tmp_path):
    with pytest.raises(StartupError, match="'nowhere' is no directory"):
        load_family(tmp_path / "nowhere", limits(LIMIT))


def test_decoding_is_counted_where_it_happens_in_filling_too(family):
    prepared = family.open("image", encoded(drawn(600, 400)), ItemOptions("uint8"))
    in_opening = prepared.decode_ns
    assert in_opening > 0
    prepared.fill({spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields})
    assert prepared.decode_ns > in_opening


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 1536, "vision_config": {"hidden_size": 1536, "embed_dim": 1280}}, 1536),
        ({"text_config": {"hidden_size": 2048}, "vision_config": {"out_hidden_size": 2048}}, 2048),
        (
            {
                "text_config": {"hidden_size": 4096},
                "vision_config": {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
            },
            4 * 4096,
        ),
        ({"vision_config": {}}, None),
        ({"hidden_size": "wide"}, None),
    ],
)
def test_an_embedding_is_as_wide_as_the_text_model_and_its_deeper_layers_take_it(config, width):
    assert embeds_width(config) == width
