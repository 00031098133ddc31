"""The generic family gives what the model's own processor gives, for LLaVA-1.5 and for Qwen2-Audio."""

import io
import time

import numpy as np
import pytest
from model_fixtures import limits, write_llava, write_qwen2_vl
from PIL import Image, ImageOps
from tests.models import write_qwen2_audio
from tests.pictures import samples, translucent
from tests.recordings import encoded as recorded
from tests.recordings import sound
from transformers import AutoProcessor

from mmprep.arguments import choose
from mmprep.card import ItemOptions, pack_io
from mmprep.errors import DecodeError, InvalidRequest, StartupError, TooLarge, UnsupportedMedia
from mmprep.items import Plan, Run, storage_dtype, unpack_meta
from mmprep_worker.lanes.warmup import warm_up
from mmprep_worker.models.registry import load_family

RANDOM = np.random.default_rng(5)
LIMIT = 100_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava")
    write_llava(directory)
    return directory


@pytest.fixture(scope="module")
def family(model):
    return load_family(model, limits(LIMIT))


@pytest.fixture(scope="module")
def processor(model):
    return AutoProcessor.from_pretrained(model)


def encoded(image, kind="PNG", **options):
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def drawn(width, height):
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def processed(family, data, dtype="float32"):
    prepared = family.open("image", data, ItemOptions(dtype))
    tensors = {spec.name: np.full(spec.shape, 7, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    return prepared.meta, tensors


@pytest.mark.parametrize("size", [(640, 480), (30, 500), (336, 336), (7, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P"])
def test_fields_equal_the_processors(family, processor, size, mode):
    data = encoded(translucent(*size).convert(mode))
    _, tensors = processed(family, data)
    expected = processor.image_processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")
    assert tensors.keys() == {"pixel_values"}
    assert tensors["pixel_values"].tobytes() == np.ascontiguousarray(expected["pixel_values"][0]).tobytes()


@pytest.mark.parametrize("key", [("PNG", "palette, all translucent"), ("PNG", "RGB, transparent"), ("JPEG", "CMYK")])
def test_other_modes_equal_the_processors(family, processor, key):
    data = samples()[key]
    expected = processor.image_processor(images=[Image.open(io.BytesIO(data))], return_tensors="np")
    assert np.array_equal(processed(family, data)[1]["pixel_values"], expected["pixel_values"][0])


def test_another_background_is_another_picture_and_another_fingerprint(model, family):
    black = load_family(model, limits(LIMIT), background=(0, 0, 0))
    assert black.card.fingerprint != family.card.fingerprint
    data = encoded(translucent(64, 48))
    assert not np.array_equal(processed(black, data)[1]["pixel_values"], processed(family, data)[1]["pixel_values"])


def test_orientation_is_applied_first(family, processor):
    tags = Image.Exif()
    tags[0x0112] = 6
    data = encoded(drawn(400, 350), "JPEG", exif=tags)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = processor.image_processor(images=[upright], return_tensors="np")
    assert np.array_equal(processed(family, data)[1]["pixel_values"], expected["pixel_values"][0])


def test_the_plan_is_the_processors_expansion_and_known_from_the_header(family, processor):
    data = encoded(drawn(640, 480))
    ids = processor(images=[drawn(640, 480)], text="<image>", add_special_tokens=False)["input_ids"][0]
    meta, _ = processed(family, data)
    assert meta.plan.token_ids() == list(ids)
    token_id = family.card.placeholder("image").token_id
    assert meta.plan == Plan((Run(token_id, 576),))
    header = data[:200]
    assert family.plan("image", header, ItemOptions("float32")) == meta.plan


@pytest.mark.parametrize(
    "kwargs",
    [
        {"size": {"shortest_edge": 100}},
        {"crop_size": {"height": 84, "width": 140}},
        {"size": {"shortest_edge": 200}, "crop_size": {"height": 224, "width": 196}, "resample": 2},
        {"do_center_crop": False, "size": {"shortest_edge": 98}},
        {"do_resize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False},
    ],
)
def test_what_a_request_chooses_is_what_the_processor_does_with_it(family, processor, kwargs):
    data = encoded(drawn(300, 400))
    options = ItemOptions("float32", kwargs=choose(family.card.arguments, kwargs, {"image"})["image"])
    prepared = family.open("image", data, options)
    tensors = {spec.name: np.empty(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    picture = Image.open(io.BytesIO(data))
    expected = processor.image_processor(images=[picture], return_tensors="np", **kwargs)["pixel_values"][0]
    ids = processor(images=[picture], text="<image>", add_special_tokens=False, images_kwargs=kwargs)["input_ids"][0]
    assert np.array_equal(tensors["pixel_values"], expected)
    assert prepared.meta.plan.token_ids() == list(ids)
    assert family.plan("image", data, options) == prepared.meta.plan


def test_what_the_processor_is_configured_to_do_is_no_choice(family):
    anyway = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_resize": True}
    assert choose(family.card.arguments, {**anyway, "resample": 3, "do_center_crop": True}, {"image"}) == {}


@pytest.mark.parametrize(
    ("kwargs", "place"),
    [
        ({"size": {"height": 336, "width": 336}}, "size.height"),
        ({"size": {"shortest_edge": 4097}}, "size.shortest_edge"),
        ({"size": 336}, "size"),
        ({"crop_size": {"height": 336}}, "crop_size"),
        ({"crop_size": {"height": 0, "width": 9}}, "crop_size.height"),
        ({"do_resize": None, "do_center_crop": 1}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 6}, "resample"),
        ({"device": "cuda"}, "device"),
        ({"return_tensors": "pt"}, "return_tensors"),
        ({"max_pixels": 9}, "max_pixels"),
    ],
)
def test_what_the_processor_does_not_take_or_is_not_safe_is_refused_by_name(family, kwargs, place):
    with pytest.raises(InvalidRequest) as caught:
        choose(family.card.arguments, kwargs, {"image"})
    assert caught.value.param == f"mm_processor_kwargs.{place}"


def test_a_narrow_picture_that_would_become_huge_is_refused_by_its_header(family):
    data = encoded(Image.new("L", (1, 8000)))
    options = ItemOptions(
        "float32", kwargs=choose(family.card.arguments, {"size": {"shortest_edge": 4096}}, {"image"})["image"]
    )
    for ask in (family.open, family.plan):
        with pytest.raises(TooLarge, match="134,217,728,000 pixels"):
            ask("image", data, options)


def test_narrow_types_are_float32_rounded(family):
    data = encoded(drawn(100, 80))
    exact = processed(family, data)[1]["pixel_values"]
    half = processed(family, data, "float16")[1]["pixel_values"]
    assert half.tobytes() == exact.astype(np.float16).tobytes()
    brain = processed(family, data, "bfloat16")[1]["pixel_values"]
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(wide - exact).max() <= np.abs(exact).max() / 256


def test_the_card_and_the_metadata_describe_the_model(family):
    assert family.card.family == "hf:llava"
    assert family.card.placeholder("image").token == "<image>"
    assert family.card.dtypes == {"image": ("float32", "bfloat16", "float16")}
    meta, _ = processed(family, encoded(drawn(64, 64)))
    assert unpack_meta(meta.pack()) == meta
    assert [(spec.name, spec.shape, spec.kind) for spec in meta.fields] == [("pixel_values", (3, 336, 336), "batched")]


def test_errors_are_those_of_the_seam(family):
    with pytest.raises(InvalidRequest, match="float32, bfloat16, float16"):
        family.open("image", encoded(drawn(8, 8)), ItemOptions("uint8"))
    with pytest.raises(InvalidRequest, match="not audio"):
        family.plan("audio", b"x", ItemOptions("float32"))
    with pytest.raises(DecodeError):
        family.open("image", encoded(drawn(80, 80))[:-3000], ItemOptions("float32"))


def test_a_processor_that_needs_torch_is_refused_at_the_start(tmp_path):
    write_qwen2_vl(tmp_path, processor={"image_processor_type": "Qwen2VLImageProcessor", "resample": 2})
    with pytest.raises(StartupError, match="needs torch"):
        load_family(tmp_path, limits(LIMIT))


def test_a_broken_processor_is_refused_at_the_start(tmp_path):
    write_llava(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(StartupError, match=r"preprocessor_config\.json"):
        load_family(tmp_path, limits(LIMIT))


def test_decoding_is_counted_apart_from_processing(family, monkeypatch):
    seen = []
    process = family._process
    monkeypatch.setattr(family, "_process", lambda *given: (seen.append(time.monotonic_ns()), process(*given))[1])
    started = time.monotonic_ns()
    prepared = family.open("image", encoded(drawn(600, 400)), ItemOptions("float32"))
    assert 0 < prepared.decode_ns <= seen[0] - started


# --- recordings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """A configuration that the kernel for Qwen2-Audio does not honour."""
    return write_qwen2_audio(tmp_path_factory.mktemp("qwen2_audio"), padding_value=0.25)


@pytest.fixture(scope="module")
def hearer(hearing):
    return load_family(hearing, limits(audio_seconds=60.0))


def heard(family, data, dtype="float32"):
    prepared = family.open("audio", data, ItemOptions(dtype))
    tensors = {spec.name: np.full(spec.shape, 7, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    return prepared.meta, tensors


@pytest.mark.parametrize("seconds", [0.05, 2.0, 31.0])
def test_recordings_give_what_the_models_own_processor_gives(hearer, hearing, seconds):
    samples = sound(16_000, seconds)
    data = recorded("wav-float", samples, 16_000)
    meta, tensors = heard(hearer, data)
    own = AutoProcessor.from_pretrained(hearing)
    expected = own(text="<|AUDIO|>", audio=[samples[:, 0]], sampling_rate=16_000, return_tensors="np")
    assert tensors.keys() == {"input_features", "feature_attention_mask"}
    assert tensors["input_features"].tobytes() == expected["input_features"][0].tobytes()
    assert np.array_equal(tensors["feature_attention_mask"], expected["feature_attention_mask"][0])
    assert meta.plan.token_ids() == expected["input_ids"][0].tolist()
    assert hearer.plan("audio", data, ItemOptions("float32")) == meta.plan


def test_recordings_are_what_such_a_model_takes(hearer):
    assert hearer.card.family == "hf:qwen2_audio"
    assert [(p.modality, p.token) for p in hearer.card.placeholders] == [("audio", "<|AUDIO|>")]
    assert hearer.card.dtypes == {"audio": ("float32", "bfloat16", "float16")}
    warm_up(hearer, {"audio"})


def test_a_recording_of_which_the_processor_makes_nothing_is_refused(hearer):
    for count in (0, 100):
        with pytest.raises(InvalidRequest, match=f"makes nothing of a recording of {count} samples"):
            hearer.plan("audio", recorded("wav-16", sound(16_000, 1.0)[:count], 16_000), ItemOptions("float32"))


def test_errors_of_recordings_are_those_of_the_seam(hearer):
    for modality, data, options, error, words in (
        ("image", b"x", ItemOptions("float32"), InvalidRequest, "takes recordings here, not image"),
        ("audio", b"<html>", ItemOptions("float32"), UnsupportedMedia, "WAV"),
        ("audio", recorded("wav-16", sound(16_000, 61.0), 16_000), ItemOptions("float32"), TooLarge, "60 seconds"),
        ("audio", b"x", ItemOptions("uint8"), InvalidRequest, "float32, bfloat16"),
        ("audio", b"x", ItemOptions("float32", pack_io({"fps": 2})), InvalidRequest, "'fps'"),
    ):
        with pytest.raises(error, match=words):
            hearer.open(modality, data, options)
