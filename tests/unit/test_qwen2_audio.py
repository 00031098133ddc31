"""The Qwen2-Audio family equals transformers' own processor to the bit, and knows from a header what it will decode."""

import json

import numpy as np
import pytest
import soxr
from model_fixtures import limits
from tests.models import QWEN2_AUDIO_PREPROCESSOR, write_qwen2_audio
from tests.recordings import FORMATS, encoded, sound, with_ffmpeg, with_sndfile, without_length
from transformers import AutoProcessor

from mmprep.card import ItemOptions, pack_io
from mmprep.errors import DecodeError, InvalidRequest, MmprepError, StartupError, TooLarge, UnsupportedMedia
from mmprep.items import Plan, Run, storage_dtype, unpack_meta
from mmprep_worker.lanes.warmup import warm_up
from mmprep_worker.models.generic_hf import GenericFamily
from mmprep_worker.models.qwen2_audio import Qwen2AudioFamily, count_tokens, read_settings
from mmprep_worker.models.registry import load_family

RATE = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen2_audio(tmp_path_factory.mktemp("qwen2_audio"))


@pytest.fixture(scope="module")
def family(model):
    return load_family(model, limits())


@pytest.fixture(scope="module")
def processor(model):
    return AutoProcessor.from_pretrained(model)


def processed(family, data, dtype="float32"):
    prepared = family.open("audio", data, ItemOptions(dtype))
    tensors = {spec.name: np.full(spec.shape, 77, storage_dtype(spec.dtype)) for spec in prepared.meta.fields}
    prepared.fill(tensors)
    return prepared.meta, tensors


def assert_equals_transformers(family, processor, data, mono):
    """Compare with the processor's work on ``mono``, float32 samples at the model's rate that no code of ours made."""
    meta, tensors = processed(family, data)
    expected = processor(text="<|AUDIO|>", audio=[mono], sampling_rate=RATE, return_tensors="np")
    assert tensors["input_features"].tobytes() == expected["input_features"][0].tobytes()
    assert np.array_equal(tensors["feature_attention_mask"], expected["feature_attention_mask"][0])
    assert tensors["feature_attention_mask"].dtype == expected["feature_attention_mask"].dtype
    assert meta.plan.token_ids() == expected["input_ids"][0].tolist()
    assert tensors["audio_num_tokens"] == meta.plan.length
    assert family.plan("audio", data, ItemOptions("float32")) == meta.plan


@pytest.mark.parametrize("count", [321, 480, 481, 8_000, 16_001, 77_777, 479_999, 480_000, 480_001, 800_000])
def test_lengths_equal_transformers(family, processor, count):
    samples = sound(RATE, 50.0)[:count]
    assert_equals_transformers(family, processor, encoded("wav-float", samples, RATE), samples[:, 0])


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [1.7, 33.0])
def test_rates_and_channels_equal_transformers_on_what_soxr_makes_of_them(family, processor, rate, seconds):
    samples = sound(rate, seconds, 2)
    resampled = soxr.resample(samples.mean(axis=1), rate, RATE, "HQ")
    mono = np.pad(resampled, (0, -(-len(samples) * RATE // rate) - len(resampled)))
    assert_equals_transformers(family, processor, encoded("wav-float", samples, rate), mono)


@pytest.mark.parametrize("name", ["wav-double", "aiff-float", "wav-float"])
def test_lossless_formats_equal_transformers(family, processor, name):
    samples = sound(RATE, 2.5)
    assert_equals_transformers(family, processor, encoded(name, samples, RATE), samples[:, 0])


@pytest.mark.parametrize("name", ["wav-16", "aiff-16", "flac-16", "flac-stream", "rf64", "m4a-alac"])
def test_formats_of_16_bits_equal_transformers(family, processor, name):
    whole = np.random.default_rng(4).integers(-(2**15), 2**15, (30_000, 1)).astype(np.int16)
    data = FORMATS[name].encode((whole / 2**15).astype(np.float32), RATE)
    assert_equals_transformers(family, processor, data, (whole[:, 0] / 2**15).astype(np.float32))


def test_the_fields_are_those_of_the_engine(family, model):
    meta, tensors = processed(family, encoded("wav-16", sound(RATE, 3.0), RATE))
    token = json.loads((model / "config.json").read_text())["audio_token_index"]
    assert [(f.name, f.dtype, f.shape, f.kind, f.keep_on_cpu) for f in meta.fields] == [
        ("input_features", "float32", (128, 3000), "batched", False),
        ("feature_attention_mask", "int32", (3000,), "batched", False),
        ("audio_num_tokens", "int64", (), "batched", True),
    ]
    assert meta.plan == Plan((Run(token, 75),))
    assert meta.cpu == {"audio_num_tokens": tensors["audio_num_tokens"].tobytes()}
    assert unpack_meta(meta.pack()) == meta
    assert (family.card.family, family.card.dtypes) == ("qwen2_audio", {"audio": ("float32", "bfloat16", "float16")})
    assert family.card.placeholders[0].part_text == "<|audio_bos|><|AUDIO|><|audio_eos|>"


def test_narrow_types_are_float32_rounded(family):
    data = encoded("wav-16", sound(RATE, 1.0), RATE)
    exact = processed(family, data)[1]["input_features"]
    assert processed(family, data, "float16")[1]["input_features"].tobytes() == exact.astype(np.float16).tobytes()
    brain = processed(family, data, "bfloat16")[1]["input_features"]
    wide = (brain.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(wide - exact).max() <= np.abs(exact).max() / 256


def test_a_minute_is_cut_off_after_thirty_seconds(family):
    samples = sound(RATE, 60.0)
    meta, tensors = processed(family, encoded("wav-16", samples, RATE))
    first = processed(family, encoded("wav-16", samples[: 30 * RATE], RATE))
    assert meta.plan == first[0].plan
    assert meta.plan.length == 750
    assert tensors["input_features"].tobytes() == first[1]["input_features"].tobytes()


def test_the_count_of_ids_is_what_the_encoders_layers_leave():
    # A convolution of width 3, stride 2 and padding 1, then the average of every two; what is left over is dropped.
    for frames in range(1, 3001):
        assert count_tokens(frames) == ((frames + 2 - 3) // 2 + 1) // 2


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seconds", [0.021, 0.5, 2.0, 31.0])
def test_the_plan_is_that_of_the_whole_work(family, name, seconds):
    rate = (FORMATS[name].rates or (22_050,))[-1]
    data = encoded(name, sound(rate, seconds), rate)
    plan = family.plan("audio", data, ItemOptions("float32"))
    meta, tensors = processed(family, data)
    assert plan == meta.plan
    assert count_tokens(int(tensors["feature_attention_mask"].sum())) == plan.length


@pytest.mark.parametrize("name", [name for name, how in FORMATS.items() if how.exact])
def test_a_plan_needs_no_decoding_where_the_header_is_exact(family, name, monkeypatch):
    rate = (FORMATS[name].rates or (22_050,))[-1]
    data = encoded(name, sound(rate, 2.0), rate)
    expected = processed(family, data)[0].plan
    monkeypatch.setattr(family, "waveform", None)
    assert family.plan("audio", data, ItemOptions("float32")) == expected
    assert family.open("audio", data, ItemOptions("float32")).meta.plan == expected


@pytest.mark.parametrize("name", FORMATS)
def test_plan_and_work_agree_on_a_truncated_recording_or_the_work_fails(family, name):
    rate = (FORMATS[name].rates or (16_000,))[-1]
    data = encoded(name, sound(rate, 1.0), rate)
    for cut in np.linspace(10, len(data) - 1, 16, dtype=int):
        outcomes = []
        for work in (
            lambda part: family.plan("audio", part, ItemOptions("float32")),
            lambda part: processed(family, part)[0].plan,
        ):
            try:
                outcomes.append(work(data[:cut]))
            except (DecodeError, UnsupportedMedia, InvalidRequest) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1] or outcomes[1] is DecodeError


@pytest.mark.parametrize("announced", [10_000, 17_000, 600_000, 3_000_000])
def test_a_header_that_announces_more_than_there_is_gives_a_plan_and_no_tensors(family, announced):
    data = without_length(encoded("flac-16", sound(RATE, 1.0), RATE), announced)
    plan = family.plan("audio", data, ItemOptions("float32"))
    if announced <= RATE:
        assert processed(family, data)[0].plan == plan
    else:
        with pytest.raises(DecodeError, match=r"broken|truncated"):
            processed(family, data)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav-16", "wav-float", "aiff-16"])
@pytest.mark.parametrize("count", [0, 1, 160, 320])
def test_what_gives_no_id_is_too_short(family, name, count):
    data = encoded(name, sound(RATE, 1.0)[:count], RATE)
    for work in (family.plan, family.open):
        with pytest.raises(InvalidRequest, match=f"too short: it has {count} samples.*at least 321"):
            work("audio", data, ItemOptions("float32"))


def test_a_short_recording_is_measured_at_the_models_rate(family):
    long_enough = sound(48_000, 1.0)[:961]
    assert family.plan("audio", encoded("wav-16", long_enough, 48_000), ItemOptions("float32")).length == 1
    with pytest.raises(InvalidRequest, match="too short: it has 320 samples at 16000"):
        family.plan("audio", encoded("wav-16", long_enough[:960], 48_000), ItemOptions("float32"))


def test_errors_are_those_of_the_seam(family):
    data = encoded("wav-16", sound(RATE, 1.0), RATE)
    for modality, medium, options, error, words in (
        ("image", data, ItemOptions("float32"), InvalidRequest, "not image"),
        ("audio", data, ItemOptions("float32", pack_io({"num_frames": 3})), InvalidRequest, "'num_frames'"),
        ("audio", b"<html>", ItemOptions("float32"), UnsupportedMedia, "WAV, AIFF, FLAC"),
        ("audio", with_ffmpeg(None, 0, "mp4", None, video="mpeg4"), ItemOptions("float32"), UnsupportedMedia, "sound"),
    ):
        for work in (family.plan, family.open):
            with pytest.raises(error, match=words):
                work(modality, medium, options)
    with pytest.raises(InvalidRequest, match="float32, bfloat16, float16"):
        family.open("audio", data, ItemOptions("uint8"))
    with pytest.raises(DecodeError, match="not all numbers"):
        processed(family, with_sndfile(np.full((16_000, 1), np.nan, np.float32), RATE, "WAV", "FLOAT"))


def test_the_limit_of_seconds_is_the_services(model):
    strict = load_family(model, limits(audio_seconds=2.0))
    assert strict.plan("audio", encoded("mp3", sound(RATE, 1.9), RATE), ItemOptions("float32")).length > 40
    for name in FORMATS:
        rate = (FORMATS[name].rates or (16_000,))[-1]
        with pytest.raises(TooLarge, match="--max-audio-duration"):
            processed(strict, encoded(name, sound(rate, 2.5), rate))


# --- model directories ------------------------------------------------------------------------------------------------


def test_warming_up_uses_every_dtype_and_leaves_the_family_as_it_was(family):
    warm_up(family, {"audio"})
    assert family.plan("audio", encoded("wav-16", sound(RATE, 1.0), RATE), ItemOptions("float32")).length == 25


def test_a_configuration_within_processor_config_wins(tmp_path):
    write_qwen2_audio(tmp_path)
    section = {**QWEN2_AUDIO_PREPROCESSOR, "chunk_length": 10}
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": section}))
    assert load_family(tmp_path, limits()).settings.frames == 1000


def test_what_decides_over_features_changes_the_fingerprint(family, tmp_path):
    other = load_family(write_qwen2_audio(tmp_path, feature_size=80), limits())
    assert other.card.fingerprint != family.card.fingerprint
    assert isinstance(other, Qwen2AudioFamily)


@pytest.mark.parametrize(
    "change",
    [
        {"padding_value": 0.5},
        {"padding_side": "left"},
        {"dither": 1e-4},
        {"feature_extractor_type": "SeamlessM4TFeatureExtractor"},
        {"hop_length": 0},
        {"hop_length": 7777},
        {"n_fft": 401},
        {"feature_size": "128"},
        {"sampling_rate": 2**30},
    ],
)
def test_configurations_that_the_kernel_cannot_honour_are_not_its(change):
    assert read_settings(QWEN2_AUDIO_PREPROCESSOR) is not None
    assert read_settings({**QWEN2_AUDIO_PREPROCESSOR, **change}) is None


def test_another_configuration_is_left_to_the_models_own_processor(tmp_path):
    family = load_family(write_qwen2_audio(tmp_path, padding_value=0.25), limits())
    assert isinstance(family, GenericFamily)


def test_a_tokenizer_of_another_model_is_refused_at_the_start(tmp_path):
    write_qwen2_audio(tmp_path, config={"audio_token_index": 3})
    with pytest.raises(StartupError, match="audio_token_index"):
        load_family(tmp_path, limits())


def test_every_error_of_a_recording_is_one_of_the_tree(family):
    random = np.random.default_rng(5)
    data = encoded("ogg-opus", sound(48_000, 0.5), 48_000)
    told = []
    for _ in range(60):
        changed = bytearray(data)
        for at in random.integers(0, len(data), 3):
            changed[at] = random.integers(256)
        try:
            told.append(processed(family, bytes(changed))[0].plan.length)
        except MmprepError as error:
            told.append(error.code)
    assert set(told) <= {400, 413, 415, 422, *range(1, 14)}
