"""Videos of the Qwen2-VL family equal transformers' own operations, frame by frame, and their plans equal what is filled."""

import ast
import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import CLIP_MEAN, CLIP_STD, QWEN2_VL, QWEN3_VL, limits, write_json, write_qwen2_vl
from PIL import Image
from tests.videos import animated, decoded, filmed, scene
from tokenizers import Tokenizer
from transformers.image_transforms import normalize, rescale
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen2_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from mmprep.arguments import choose
from mmprep.card import ItemOptions, pack_io
from mmprep.errors import DecodeError, InvalidRequest, StartupError, TooLarge, UnsupportedMedia
from mmprep.items import storage_dtype, unpack_meta
from mmprep_worker.lanes.warmup import warm_up
from mmprep_worker.models.qwen2_vl_settings import QWEN2_VIDEOS, QWEN3_VIDEOS, read_video_settings
from mmprep_worker.models.registry import load_family
from mmprep_worker.video.sampling import Choice, Sampler, evenly, in_pairs

#: Small enough that the frames of the tests are resized.
SMALL_VIDEOS = {**QWEN2_VL, "min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 12}
QWEN3_VIDEO = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}


class _Torch:
    """As much of torch as ``sample_frames`` needs: ``arange`` in float32, cut by ``int``."""

    class Cut(np.ndarray):
        def int(self):
            return np.asarray(self).astype(np.int32)

    @staticmethod
    def arange(start, stop, step=1):
        return np.arange(start, stop, step).astype(np.float32).view(_Torch.Cut)


def _functions_of_transformers(path, *names):
    """Return functions of a module of transformers that can't be imported without torch, compiled from its source."""
    tree = ast.parse((Path(transformers.__file__).parent / path).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
    space = {"math": math, "np": np, "torch": _Torch}
    exec(compile(ast.Module(found, []), path, "exec"), space)
    return [space[name] for name in names]


qwen3_resize, qwen3_sample = _functions_of_transformers(
    "models/qwen3_vl/video_processing_qwen3_vl.py", "smart_resize", "sample_frames"
)
(qwen2_sample,) = _functions_of_transformers("models/qwen2_vl/video_processing_qwen2_vl.py", "sample_frames")


def patchified(frames, patch, times, merge):
    """Cut frames (T, 3, H, W) into patches as ``Qwen2VLVideoProcessor.patchify`` does."""
    frames = np.concatenate([frames, *[frames[-1:]] * (-len(frames) % times)])
    count, channels, height, width = frames.shape
    grid = count // times, height // patch, width // patch
    patches = frames.reshape(
        grid[0], times, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(math.prod(grid), -1), grid


def expected_of(frames, size, config, dtype):
    """Return pixels and grid of RGB frames, by Pillow's resize and transformers' rescale and normalize."""
    resized = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC) for frame in frames]
    planar = [np.asarray(frame).transpose(2, 0, 1) for frame in resized]
    if dtype == "float32":
        mean, std = config["image_mean"], config["image_std"]
        planar = [
            normalize(
                rescale(plane, 1 / 255, input_data_format="channels_first"),
                mean,
                std,
                input_data_format="channels_first",
            )
            for plane in planar
        ]
    return patchified(np.stack(planar), config["patch_size"], config["temporal_patch_size"], config["merge_size"])


def processed(family, data, dtype="float32", kwargs=None, **io):
    packed = choose(family.card.arguments, kwargs or {}, {"video"}).get("video", b"")
    options = ItemOptions(dtype, pack_io(io), packed)
    prepared = family.open("video", data, options)
    tensors = {spec.name: np.full(spec.shape, 77, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    assert family.plan("video", data, options) == prepared.meta.plan
    assert unpack_meta(prepared.meta.pack()) == prepared.meta
    for name, raw in prepared.meta.cpu.items():
        assert tensors[name].tobytes() == raw
    return prepared.meta, tensors


def family_of(directory, model_type, processor=None, video=None, **kwargs):
    write_qwen2_vl(directory, model_type, processor)
    if video is not None:
        write_json(directory / "video_preprocessor_config.json", video)
    return load_family(directory, limits(**kwargs))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return family_of(tmp_path_factory.mktemp("qwen2"), "qwen2_vl", SMALL_VIDEOS)


@pytest.fixture(scope="module")
def qwen25(tmp_path_factory):
    return family_of(tmp_path_factory.mktemp("qwen25"), "qwen2_5_vl", SMALL_VIDEOS)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return family_of(tmp_path_factory.mktemp("qwen3"), "qwen3_vl", QWEN3_VL, QWEN3_VIDEO)


def assert_qwen2(family, data, frames, dtype, *, kwargs=None, least=None, most=None, **io):
    meta, tensors = processed(family, data, dtype, kwargs, **io)
    height, width = frames[0].shape[:2]
    size = qwen2_resize(height, width, 28, least or SMALL_VIDEOS["min_pixels"], most or SMALL_VIDEOS["max_pixels"])
    pixels, grid = expected_of(frames, size, SMALL_VIDEOS, dtype)
    assert tensors["video_grid_thw"].tolist() == list(grid)
    assert tensors["pixel_values_videos"].shape == pixels.shape
    assert tensors["pixel_values_videos"].tobytes() == np.ascontiguousarray(pixels).tobytes()
    token_id = family.card.placeholder("video").token_id
    assert meta.plan.token_ids() == [token_id] * (math.prod(grid) // 4)
    assert meta.plan.is_embed() is None
    return tensors


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_frames_are_paired_and_equal_transformers(qwen2, dtype, count):
    data = filmed(count)
    wanted = range(count) if count <= 32 else np.linspace(0, count - 1, 32, dtype=int)
    assert_qwen2(qwen2, data, [decoded(data)[index] for index in wanted], dtype)


@pytest.mark.parametrize("encoder", ["mpeg4", "libx265", "libvpx", "libvpx-vp9", "libsvtav1"])
def test_every_codec_is_processed(qwen2, encoder):
    before = os.sched_getscheduler(0)
    data = filmed(6, encoder=encoder)
    assert os.sched_getscheduler(0) == before, "the encoder makes this test, and those behind it, a real-time process"
    assert_qwen2(qwen2, data, decoded(data), "float32")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_processed(qwen2, kind):
    data = animated(5, kind)
    with Image.open(__import__("io").BytesIO(data)) as image:
        frames = []
        for index in range(5):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    assert_qwen2(qwen2, data, frames, "uint8")


def test_turned_videos_are_processed_upright(qwen2):
    data = filmed(scene(4, 200, 60), rotation=90)
    assert_qwen2(qwen2, data, [np.ascontiguousarray(np.rot90(frame)) for frame in decoded(data)], "float32")


def test_narrow_types_are_float32_rounded(qwen2):
    data = filmed(3)
    exact = processed(qwen2, data)[1]["pixel_values_videos"]
    half = processed(qwen2, data, "float16")[1]["pixel_values_videos"]
    assert half.tobytes() == exact.astype(np.float16).tobytes()


def test_a_request_chooses_frames(qwen2):
    data = filmed(90)
    frames = decoded(data)
    assert_qwen2(qwen2, data, [frames[index] for index in (0, 44, 89)], "uint8", num_frames=3)
    assert_qwen2(qwen2, data, [frames[index] for index in (0, 29, 59, 89)], "uint8", num_frames=4, fps=30)
    assert_qwen2(qwen2, data, [frames[index] for index in (0, 44, 89)], "uint8", fps=1)
    with pytest.raises(InvalidRequest) as refused:
        processed(qwen2, data, fps="fast")
    assert refused.value.param == "media_io_kwargs.video.fps"


@pytest.mark.parametrize(
    ("kwargs", "least", "most"),
    [
        ({"max_pixels": 28 * 28 * 5}, None, 28 * 28 * 5),
        ({"size": {"shortest_edge": 28 * 28 * 9, "longest_edge": 28 * 28 * 10}}, 28 * 28 * 9, 28 * 28 * 10),
    ],
)
def test_a_request_chooses_the_size_of_frames(qwen2, kwargs, least, most):
    data = filmed(4)
    assert_qwen2(qwen2, data, decoded(data), "float32", kwargs=kwargs, least=least, most=most)


def reference(sample, config, count, rate, kwargs):
    """Return the frames that a processor of transformers takes; its sampling is called as a function."""
    processor = types.SimpleNamespace(
        **{"fps": None, "num_frames": None, "min_frames": 4, "max_frames": 768, "temporal_patch_size": 2, **config}
    )
    return sample(processor, types.SimpleNamespace(total_num_frames=count, fps=rate), **kwargs).tolist()


@pytest.mark.parametrize("kwargs", [{"num_frames": 6}, {"num_frames": 7}, {"fps": 3}, {"fps": 0.1}, {"fps": 100.0}])
def test_a_request_lets_the_processor_choose_frames(qwen2, qwen3, kwargs):
    data = filmed(90)
    frames = decoded(data)
    wanted = reference(qwen2_sample, {}, 90, 30.0, kwargs)
    assert_qwen2(qwen2, data, [frames[index] for index in wanted], "uint8", kwargs={**kwargs, "do_sample_frames": True})
    assert_qwen2(qwen2, data, [frames[index] for index in wanted], "uint8", kwargs=kwargs, num_frames=-1)
    wanted = reference(qwen3_sample, {"fps": 2}, 90, 30.0, kwargs)
    tensors = processed(qwen3, data, "uint8", kwargs)[1]
    assert tensors["video_grid_thw"][0] == -(-len(wanted) // 2)
    wanted += wanted[-1:] * (len(wanted) % 2)
    assert tensors["timestamps"].tolist() == [
        (one / 30.0 + other / 30.0) / 2 for one, other in zip(wanted[::2], wanted[1::2], strict=True)
    ]


@given(
    count=st.integers(2, 20_000),
    rate=st.floats(1, 240),
    kwargs=st.fixed_dictionaries({"num_frames": st.integers(2, 768)})
    | st.fixed_dictionaries({"fps": st.floats(0.001, 1000)}),
)
def test_processors_choose_as_transformers_does_for_every_length_and_rate(count, rate, kwargs):
    for rule, sample, config in ((in_pairs, qwen2_sample, {}), (evenly, qwen3_sample, {"fps": 2})):
        choice = Choice(**kwargs)
        try:
            wanted = reference(sample, config, count, rate, kwargs)
        except ValueError:  # more frames than there are
            wanted = []
        if not wanted or len(set(wanted)) < len(wanted):  # Qwen3-VL's would take some of them again
            with pytest.raises(InvalidRequest):
                rule(count, rate, choice, 768, Sampler())
            continue
        assert rule(count, rate, choice, 768, Sampler()) == [index for index in wanted if index < count]
        assert len(rule(count, rate, choice, 5, Sampler())) <= 5


@pytest.mark.parametrize(
    ("kwargs", "io", "name"),
    [
        ({"fps": 1, "num_frames": 4}, {}, "num_frames"),
        ({"fps": 1, "do_sample_frames": False}, {}, "do_sample_frames"),
        ({"fps": 1}, {"num_frames": 3}, "fps"),
        ({"num_frames": 4}, {"fps": 3}, "num_frames"),
        ({"num_frames": 4}, {}, "num_frames"),
        ({"fps": 30}, {}, "fps"),
    ],
)
def test_a_choice_that_contradicts_itself_or_finds_too_few_frames_is_refused(qwen2, kwargs, io, name):
    with pytest.raises(InvalidRequest) as refused:
        processed(qwen2, filmed(1), "uint8", kwargs, **io)
    assert refused.value.param == f"mm_processor_kwargs.{name}"


def test_the_pixels_of_all_frames_of_qwen3_are_chosen(qwen3):
    data = filmed(8)
    height, width = decoded(data)[0].shape[:2]
    size = {"shortest_edge": 4096, "longest_edge": 32 * 32 * 4 * 6}
    kwargs = {"size": size, "num_frames": 4}
    expected = qwen3_resize(4, height, width, 2, 32, size["shortest_edge"], size["longest_edge"])
    grid = processed(qwen3, data, "uint8", kwargs)[1]["video_grid_thw"].tolist()
    assert grid == [2, expected[0] // 16, expected[1] // 16]
    # The former names are the picture's alone.
    assert choose(qwen3.card.arguments, {"max_pixels": 9}, {"video", "image"}).keys() == {"image"}
    assert choose(qwen3.card.arguments, {"fps": 2, "do_sample_frames": True}, {"video"}) == {}


def test_never_more_frames_are_taken_than_the_server_allows(tmp_path):
    family = family_of(tmp_path, "qwen2_vl", SMALL_VIDEOS, video_frames=4)
    data = filmed(30)
    for io in ({}, {"num_frames": -1}, {"fps": 30}):
        assert processed(family, data, "uint8", **io)[1]["video_grid_thw"][0] == 2
    with pytest.raises(InvalidRequest, match=r"from 1 to 4 \(--max-video-frames\)"):
        processed(family, data, num_frames=5)
    assert processed(family, data, "uint8", {"fps": 30})[1]["video_grid_thw"][0] == 2
    with pytest.raises(InvalidRequest, match="from 2 to 4"):
        processed(family, data, "uint8", {"num_frames": 5})


@pytest.mark.parametrize(("count", "taken"), [(40, 32), (10, 10), (1, 1)])
def test_qwen25_is_told_how_many_seconds_a_pair_spans(qwen25, count, taken):
    data = filmed(count, rate=25)
    seconds = assert_qwen2(
        qwen25, data, [decoded(data)[i] for i in np.linspace(0, count - 1, taken, dtype=int)], "uint8"
    )["second_per_grid_ts"]
    assert seconds.shape == ()
    assert seconds == np.float32(2 / (taken / count * 25.0))


def test_fields_have_the_kinds_that_engines_batch_by(qwen2, qwen25, qwen3):
    data = filmed(4)
    pixels = ("pixel_values_videos", "uint8", "flat", False)
    grid = ("video_grid_thw", "int64", "batched", True)
    for family, more in (
        (qwen2, []),
        (qwen25, [("second_per_grid_ts", "float32", "batched", True)]),
        (qwen3, [("timestamps", "float64", "batched", True)]),
    ):
        meta, _ = processed(family, data, "uint8")
        assert [(f.name, f.dtype, f.kind, f.keep_on_cpu) for f in meta.fields] == [pixels, grid, *more]
        assert meta.modality == "video"


def reference_text(indices, rate, grid):
    """Return what transformers' processor writes in place of a video's token."""
    metadata = types.SimpleNamespace(frames_indices=list(indices), fps=rate)
    parts = types.SimpleNamespace(
        video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
    )
    parts._calculate_timestamps = types.MethodType(Qwen3VLProcessor._calculate_timestamps, parts)
    inputs = {"video_grid_thw": [np.array(grid)], "video_metadata": [metadata]}
    return Qwen3VLProcessor.replace_video_token(parts, inputs, 0), parts._calculate_timestamps(list(indices), rate)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("rate", [30, 10, 7])
@pytest.mark.parametrize("count", [2, 7, 75])
def test_qwen3_has_the_times_of_its_frames_in_the_text(qwen3, tmp_path_factory, dtype, rate, count):
    data = filmed(scene(count, 200, 120), rate=rate)
    meta, tensors = processed(qwen3, data, dtype)
    owner = types.SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    indices = qwen3_sample(owner, types.SimpleNamespace(total_num_frames=count, fps=float(rate)))
    size = qwen3_resize(len(indices), 120, 200, 2, 32, 4096, 25165824)
    pixels, grid = expected_of([decoded(data)[index] for index in indices], size, QWEN3_VIDEO, dtype)
    assert tensors["video_grid_thw"].tolist() == list(grid)
    assert tensors["pixel_values_videos"].tobytes() == np.ascontiguousarray(pixels).tobytes()

    text, times = reference_text(indices, float(rate), grid)
    assert tensors["timestamps"].tolist() == times
    tokenizer = Tokenizer.from_file(str(qwen3_directory(qwen3, tmp_path_factory) / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert meta.plan.token_ids() == ids
    pad = qwen3.card.placeholder("video").token_id
    assert meta.plan.is_embed() == [token_id == pad for token_id in ids]


def qwen3_directory(family, tmp_path_factory):
    del family  # its directory's tokenizer is written alike each time
    directory = tmp_path_factory.mktemp("tokenizer")
    write_qwen2_vl(directory, "qwen3_vl", QWEN3_VL)
    return directory


def test_a_single_frame_is_no_video_for_qwen3(qwen3):
    with pytest.raises(InvalidRequest, match="at least 2; send a picture"):
        processed(qwen3, filmed(1))
    with pytest.raises(InvalidRequest, match="at least 2; send a picture"):
        processed(qwen3, filmed(20), num_frames=1)


def test_a_server_that_allows_a_single_frame_cannot_serve_qwen3(tmp_path):
    with pytest.raises(StartupError, match="--max-video-frames 1: this model takes at least 2"):
        family_of(tmp_path, "qwen3_vl", QWEN3_VL, QWEN3_VIDEO, video_frames=1)


def test_a_plan_that_does_not_fit_into_a_message_is_refused(tmp_path):
    family = family_of(
        tmp_path,
        "qwen3_vl",
        QWEN3_VL,
        {**QWEN3_VIDEO, "size": {"longest_edge": 1024, "shortest_edge": 1}},
        video_frames=5000,
    )
    data = filmed(scene(1300, 32, 32), encoder="mpeg4")
    plan = family.plan("video", data, ItemOptions("uint8", pack_io({"num_frames": 700})))
    assert len(plan.runs) > 3000
    with pytest.raises(TooLarge, match="--max-video-frames"):
        family.plan("video", data, ItemOptions("uint8", pack_io({"num_frames": 1300})))


# --- sizes and settings -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 768), st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_qwen3_sizes_equal_transformers(frames, height, width, capped):
    chosen = read_video_settings({**QWEN3_VIDEO, "cap_pixels_per_frame": capped}, QWEN3_VIDEOS)
    most = 25165824
    if capped:  # as Qwen3VLVideoProcessor.resize
        most = max(min(768 * 32 * 32, most // frames), int(4096 * 1.05)) * frames
    try:
        expected = qwen3_resize(frames, height, width, 2, 32, 4096, most)
    except ValueError:
        with pytest.raises(InvalidRequest, match="at most 200 times"):
            chosen.size(frames, height, width)
    else:
        assert chosen.size(frames, height, width) == expected


@settings(deadline=None)
@given(st.integers(1, 768), st.integers(1, 3000), st.integers(1, 3000), st.booleans())
def test_qwen2_sizes_equal_transformers(frames, height, width, capped):
    config = {"size": {"shortest_edge": 100_352, "longest_edge": 602_112}, "cap_pixels_per_frame": capped}
    chosen = read_video_settings(config, QWEN2_VIDEOS)
    most = 602_112
    if capped:  # as Qwen2VLVideoProcessor.resize
        most = max(min(most, int(128_000 * 28 * 28 * 0.9) * 2 // frames), int(100_352 * 1.05))
    try:
        expected = qwen2_resize(height, width, 28, 100_352, most)
    except ValueError:
        with pytest.raises(InvalidRequest, match="at most 200 times"):
            chosen.size(frames, height, width)
    else:
        assert chosen.size(frames, height, width) == expected


def test_settings_come_from_where_transformers_looks(tmp_path):
    def read(**files):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        write_qwen2_vl(directory, "qwen2_5_vl")
        for name, content in files.items():
            write_json(directory / f"{name}.json", content)
        return load_family(directory, limits()).videos.settings.frame.max_pixels

    own = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 3136, "longest_edge": 100_000}}
    section = {**own, "size": {"shortest_edge": 3136, "longest_edge": 200_000}}
    assert read() == 12845056
    assert read(video_preprocessor_config=own) == 100_000
    assert read(video_preprocessor_config=own, processor_config={"video_processor": section}) == 200_000
    assert read(video_preprocessor_config={}) == 28 * 28 * 768


def test_the_defaults_are_those_of_transformers():
    second = read_video_settings({}, QWEN2_VIDEOS)
    assert (second.frame.min_pixels, second.frame.max_pixels, second.frame.patch) == (128 * 28 * 28, 28 * 28 * 768, 14)
    assert (second.frame.mean, second.frame.std) == (tuple(CLIP_MEAN), tuple(CLIP_STD))
    third = read_video_settings({}, QWEN3_VIDEOS)
    assert (third.frame.min_pixels, third.frame.max_pixels, third.frame.patch) == (128 * 32 * 32, 32 * 32 * 768, 16)
    assert (third.frame.mean, third.frame.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (second.tokens, third.tokens, second.capped, third.capped) == (128_000, 768, False, False)


@pytest.mark.parametrize(
    "odd",
    [
        {"do_sample_frames": True},
        {"do_resize": False},
        {"resample": 2},
        {"do_center_crop": True},
        {"size": {"height": 1, "width": 1}},
        {"max_video_tokens": "many"},
        {"video_processor_type": "Qwen3VLVideoProcessor"},
        {"video_processor_type": "OwnVideoProcessor"},
    ],
)
def test_a_configuration_that_cannot_be_honoured_leaves_the_model_without_videos(tmp_path, caplog, odd):
    family = family_of(tmp_path, "qwen2_vl", video=odd)
    assert [placeholder.modality for placeholder in family.card.placeholders] == ["image"]
    assert "takes no videos here" in caplog.text
    with pytest.raises(InvalidRequest):
        family.open("video", filmed(2), ItemOptions("uint8"))


def test_a_tokenizer_without_a_video_token_leaves_the_model_without_videos(tmp_path):
    ids = write_qwen2_vl(tmp_path)
    config = {"model_type": "qwen2_vl", "image_token_id": ids["<|image_pad|>"]}
    write_json(tmp_path / "config.json", config)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|video_pad|>", "<|film|>"))
    assert load_family(tmp_path, limits()).videos is None


def test_the_card_tells_of_videos(qwen2):
    placeholder = qwen2.card.placeholder("video")
    assert (placeholder.token, placeholder.part_text) == (
        "<|video_pad|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    )
    assert qwen2.card.dtypes["video"][0] == "uint8"
    assert qwen2.card.normalization["video"].field == "pixel_values_videos"


def test_what_decides_over_videos_is_part_of_the_fingerprint(tmp_path):
    prints = [
        family_of(tmp_path / str(number), kind, processor, video, video_frames=frames).card.fingerprint
        for number, (kind, processor, video, frames) in enumerate(
            [
                ("qwen2_vl", None, None, 768),
                ("qwen2_5_vl", None, None, 768),
                ("qwen2_vl", None, None, 32),
                ("qwen2_vl", None, {"min_pixels": 3136, "max_pixels": 12845056}, 768),
                ("qwen2_vl", None, {"min_pixels": 3136, "max_pixels": 12845057}, 768),
            ]
        )
    ]
    assert len(set(prints)) == len(prints)


def test_a_lane_warms_up_with_videos_whatever_the_limits(tmp_path, qwen3):
    warm_up(qwen3, {"image", "video"})
    warm_up(family_of(tmp_path, "qwen2_5_vl", image_pixels=100, video_frames=1, video_seconds=1.0), {"image", "video"})


def test_broken_videos_are_errors(qwen2):
    data = filmed(20)
    with pytest.raises(UnsupportedMedia):
        qwen2.plan("video", b"\0" * 64, ItemOptions("uint8"))
    with pytest.raises(DecodeError):
        qwen2.plan("video", data[: len(data) // 2], ItemOptions("uint8"))
    with pytest.raises(InvalidRequest, match="300 times the other"):
        qwen2.plan("video", animated(scene(2, 600, 2)), ItemOptions("uint8"))
    with pytest.raises(InvalidRequest, match="uint8, float32"):
        qwen2.open("video", data, ItemOptions("int4"))
