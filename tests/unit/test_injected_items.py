"""What lanes make of items that were processed elsewhere: each family takes what it makes itself, and no contradictions."""

import msgspec
import numpy as np
import pytest
from model_fixtures import QWEN3_VL, limits, write_json, write_llava, write_qwen2_vl
from PIL import Image
from tests.models import write_qwen2_audio
from tests.recordings import encoded, sound
from tests.unit.test_generic_hf import encoded as drawn
from tests.unit.test_qwen2_vl_video import QWEN3_VIDEO, SMALL_VIDEOS
from tests.videos import filmed, scene

from mmprep.card import ItemOptions
from mmprep.errors import InvalidRequest, ProtocolError
from mmprep.injected import pack_item, unpack_item
from mmprep.items import ItemMeta, Plan, Run, lay_out, storage_dtype
from mmprep_worker.models.injected import open_injected
from mmprep_worker.models.registry import load_family

DIGEST = bytes(range(32))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Return a function that gives families by name, each made once."""
    made = {}

    def family(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            match name:
                case "llava":
                    write_llava(directory)
                case "qwen2_audio":
                    directory = write_qwen2_audio(directory)
                case "qwen3_vl":
                    write_qwen2_vl(directory, name, QWEN3_VL)
                    write_json(directory / "video_preprocessor_config.json", QWEN3_VIDEO)
                case _:
                    write_qwen2_vl(directory, name, SMALL_VIDEOS)
            made[name] = load_family(directory, limits())
        return made[name]

    return family


def medium(modality):
    if modality == "audio":
        return encoded("wav-float", sound(16_000, 1.5), 16_000)
    if modality == "video":
        return filmed(scene(6))
    return drawn(Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)))


def own(family, modality, dtype="float32"):
    """Return metadata and arrays that the family makes of a medium."""
    prepared = family.open(modality, medium(modality), ItemOptions(dtype))
    arrays = {spec.name: np.zeros(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(arrays)
    return prepared.meta, arrays


def opened(family, meta, arrays):
    """Let the family take an item with these arrays, laid out anew by their shapes."""
    fields = [(s.name, s.dtype, arrays[s.name].shape, s.kind, s.keep_on_cpu) for s in meta.fields]
    meta = msgspec.structs.replace(meta, fields=lay_out(fields))
    frame = pack_item(meta, {name: array.tobytes() for name, array in arrays.items()})
    return open_injected(family, meta.modality, memoryview(frame), DIGEST)


OWN = [
    ("qwen2_vl", "image"),
    ("qwen2_vl", "video"),
    ("qwen2_5_vl", "video"),
    ("qwen3_vl", "video"),
    ("qwen2_audio", "audio"),
    ("llava", "image"),
]


@pytest.mark.parametrize(("name", "modality"), OWN)
def test_a_family_takes_what_it_makes_itself_and_the_copy_is_the_same(families, name, modality):
    family = families(name)
    for dtype in family.card.dtypes[modality]:
        meta, arrays = own(family, modality, dtype)
        prepared = opened(family, meta, arrays)
        assert prepared.meta == msgspec.structs.replace(meta, injected=DIGEST)
        copied = {spec.name: np.zeros(spec.shape, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
        prepared.fill(copied)
        assert {n: a.tobytes() for n, a in copied.items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize(
    ("name", "modality", "field", "change", "param"),
    [
        ("qwen2_vl", "image", "image_grid_thw", lambda grid: grid * [2, 1, 1], "fields.image_grid_thw"),
        ("qwen2_vl", "image", "image_grid_thw", lambda grid: grid * 0, "fields.image_grid_thw"),
        ("qwen2_vl", "image", "image_grid_thw", lambda grid: grid[:2], "fields.image_grid_thw"),
        ("qwen2_vl", "image", "pixel_values", lambda rows: rows[4:], "fields.image_grid_thw"),
        ("qwen2_vl", "image", "pixel_values", lambda rows: rows * np.inf, "fields.pixel_values"),
        ("qwen2_5_vl", "video", "video_grid_thw", lambda grid: grid[::-1], "fields.video_grid_thw"),
        ("qwen2_5_vl", "video", "second_per_grid_ts", lambda s: -s, "fields.second_per_grid_ts"),
        ("qwen2_5_vl", "video", "second_per_grid_ts", lambda s: s * np.float32(np.nan), "fields.second_per_grid_ts"),
        ("qwen3_vl", "video", "timestamps", lambda times: times[1:], "fields.timestamps"),
        ("qwen3_vl", "video", "timestamps", lambda times: times[::-1], "fields.timestamps"),
        ("qwen3_vl", "video", "timestamps", lambda times: times - 1, "fields.timestamps"),
        ("qwen2_audio", "audio", "feature_attention_mask", lambda m: m[::-1].copy(), "fields.feature_attention_mask"),
        ("qwen2_audio", "audio", "feature_attention_mask", lambda m: m * 2, "fields.feature_attention_mask"),
        ("qwen2_audio", "audio", "feature_attention_mask", lambda m: m * 0, "fields.audio_num_tokens"),
        ("qwen2_audio", "audio", "audio_num_tokens", lambda n: n + 1, "fields.audio_num_tokens"),
        ("qwen2_audio", "audio", "input_features", lambda f: f[:, 1:], "fields.input_features"),
        ("llava", "image", "pixel_values", lambda p: p[:, 1:], "fields.pixel_values"),
    ],
)
def test_an_item_that_contradicts_itself_is_refused_by_the_field(families, name, modality, field, change, param):  # noqa: PLR0917
    family = families(name)
    meta, arrays = own(family, modality)
    changed = np.asarray(change(arrays[field]))
    with np.errstate(all="ignore"), pytest.raises(InvalidRequest) as caught:
        opened(family, meta, {**arrays, field: np.ascontiguousarray(changed, arrays[field].dtype)})
    assert caught.value.param == param


@pytest.mark.parametrize(("name", "modality"), OWN)
def test_an_expansion_of_another_length_is_refused_and_text_around_it_is_not(families, name, modality):
    family = families(name)
    meta, arrays = own(family, modality)
    token_id = family.card.placeholder(modality).token_id
    more = msgspec.structs.replace(meta, plan=Plan((*meta.plan.runs, Run(token_id, 1))))
    with pytest.raises(InvalidRequest) as caught:
        opened(family, more, arrays)
    assert caught.value.param == "expansion"
    around = Plan((Run(1, 2, embed=False), *meta.plan.runs, Run(2, 1, embed=False)))
    assert opened(family, msgspec.structs.replace(meta, plan=around), arrays).meta.plan == around


@pytest.mark.parametrize(("name", "modality"), OWN)
def test_fields_and_kinds_that_are_not_the_familys_are_refused(families, name, modality):
    family = families(name)
    meta, arrays = own(family, modality)
    first, *others = meta.fields
    for fields, param in (
        (others, "fields"),
        ([*meta.fields, msgspec.structs.replace(first, name="more")], "fields"),
        ([msgspec.structs.replace(first, dtype="int32"), *others], f"fields.{first.name}"),
        ([msgspec.structs.replace(first, kind="shared"), *others], f"fields.{first.name}"),
        ([msgspec.structs.replace(first, keep_on_cpu=True), *others], f"fields.{first.name}"),
    ):
        told = msgspec.structs.replace(meta, fields=tuple(fields))
        with pytest.raises(InvalidRequest) as caught:
            opened(family, told, {**arrays, "more": arrays[first.name]})
        assert caught.value.param == param


def test_a_frame_that_is_no_item_is_a_breach_of_the_protocol(families):
    family = families("qwen2_vl")
    meta, arrays = own(family, "image")
    frame = pack_item(meta, {name: array.tobytes() for name, array in arrays.items()})
    assert unpack_item(memoryview(frame))[0] == meta
    for broken in (b"", frame[:7], frame[:-1], frame + b"\0", b"\xff" * 8 + frame[8:], frame[:8] + b"\xc1" + frame[9:]):
        with pytest.raises(ProtocolError):
            open_injected(family, "image", memoryview(broken), DIGEST)
    with pytest.raises(ProtocolError):
        open_injected(family, "video", memoryview(frame), DIGEST)


def test_an_item_of_a_modality_that_the_model_does_not_take_is_refused(families):
    meta = ItemMeta("audio", Plan((Run(1, 1),)), (), {})
    with pytest.raises(InvalidRequest) as caught:
        open_injected(families("qwen2_vl"), "audio", memoryview(pack_item(meta, {})), DIGEST)
    assert caught.value.param == "modality"
