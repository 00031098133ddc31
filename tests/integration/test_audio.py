"""Recordings through every door: from a request to the tensors, against transformers on samples that no code of ours made."""

import base64
import io
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from tests.integration.service import Service, decode_item, image, serving, text, user
from tests.models import write_qwen2_audio
from tests.recordings import FORMATS, encoded, sound, with_ffmpeg, with_sndfile, without_length
from transformers import AutoProcessor

from mmprep import Backend, Client, DecodeError, InvalidRequest

RATE = 16_000
PART = "messages[0].content[1].input_audio"
TOKEN = "<|AUDIO|>"
#: What no answer may hold: places on this machine, internals, addresses of objects and of hosts.
FORBIDDEN = re.compile(
    r"Traceback|/work|/tmp|/root|/usr|site-packages|\.py\b|127\.0\.0\.1|0x[0-9a-f]{6}|object at|none'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen2_audio(tmp_path_factory.mktemp("models") / "Qwen2-Audio")


@pytest.fixture(scope="module")
def service(model):
    options = ("--allow-private-networks", "--trust-request-mm-kwargs", "--frontends", 1, "--cache-size", "64MiB")
    with serving(*options, model=model) as running:
        yield running


@pytest.fixture(scope="module")
def processor(model):
    return AutoProcessor.from_pretrained(model)


def input_audio(data, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def audio_url(url):
    return {"type": "audio_url", "audio_url": {"url": url}}


def data_url(data, kind="wav"):
    return audio_url(f"data:audio/{kind};base64,{base64.b64encode(data).decode()}")


def asked(*parts):
    """Return a conversation that asks about these recordings."""
    return user(text("Listen. "), *parts, text("What is it?"))


def reference(processor, messages, recordings):
    """Return what transformers makes of a conversation and of samples at its rate."""
    told = [
        {**m, "content": [p if p["type"] == "text" else {"type": "audio", "audio": ""} for p in m["content"]]}
        for m in messages
    ]
    prompt = processor.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    return processor(text=prompt, audio=recordings, sampling_rate=RATE, return_tensors="np")


def check(answer, expected, processor, *, tensors=True):
    """Compare an answer with transformers' result, its ranges with the ids, and its tensors to the bit."""
    ids = expected["input_ids"][0].tolist()
    assert answer["token_ids"] == ids
    features = answer["features"]
    places = features["mm_placeholders"]["audio"]
    for place in places:
        assert set(ids[place["offset"] : place["offset"] + place["length"]]) == {processor.audio_token_id}
    assert sum(place["length"] for place in places) == ids.count(processor.audio_token_id)
    assert len(places) == len(expected["input_features"])
    if not tensors:
        return
    for number, (element, place) in enumerate(zip(features["kwargs_data"]["audio"], places, strict=True)):
        fields = decode_item(element)
        assert [(name, field.dtype, field.kind, field.arguments) for name, field in fields.items()] == [
            ("input_features", "float32", "batched", {"keep_on_cpu": False}),
            ("feature_attention_mask", "int32", "batched", {"keep_on_cpu": False}),
            ("audio_num_tokens", "int64", "batched", {"keep_on_cpu": True}),
        ]
        assert fields["input_features"].array.tobytes() == expected["input_features"][number].tobytes()
        assert np.array_equal(fields["feature_attention_mask"].array, expected["feature_attention_mask"][number])
        assert (fields["audio_num_tokens"].array.shape, int(fields["audio_num_tokens"].array)) == ((), place["length"])
        metadata = decode_item(features["mm_metadata"]["audio"][number])
        assert list(metadata) == ["audio_num_tokens"]


# --- sources ----------------------------------------------------------------------------------------------------------


@contextmanager
def host(files):
    """Serve ``files`` by path on loopback; give the URL."""

    class Host(BaseHTTPRequestHandler):
        def do_GET(self):
            body = files[self.path]
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("source", ["input_audio", "input_audio with a wrong format", "data URL", "http URL"])
def test_a_recording_becomes_the_ids_and_features_that_transformers_gives(service, processor, source):
    samples = sound(RATE, 3.7)
    data = with_sndfile(samples, RATE, "WAV", "FLOAT")
    with host({"/a.mp3": data}) as url:
        part = {
            "input_audio": input_audio(data),
            "input_audio with a wrong format": input_audio(data, "mp3"),
            "data URL": data_url(data, "mpeg"),
            "http URL": audio_url(f"{url}/a.mp3"),
        }[source]
        messages = asked(part)
        answer = service.render(messages)
    expected = reference(processor, messages, [samples[:, 0]])
    assert expected["input_ids"][0].tolist().count(processor.audio_token_id) == 92
    check(answer, expected, processor)
    assert answer["features"]["mm_addresses"] is None


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_heard(service, processor, name):
    rate = (FORMATS[name].rates or (RATE,))[-1]
    messages = asked(input_audio(encoded(name, sound(rate, 1.2), rate), name))
    answer = service.render(messages)
    (place,) = answer["features"]["mm_placeholders"]["audio"]
    assert 27 <= place["length"] <= 34
    assert service.post("/tokenize", {"messages": messages}).json["tokens"] == answer["token_ids"]
    plan = service.render(messages, mm_payload="none")
    assert (plan["token_ids"], plan["features"]["mm_placeholders"]) == (
        answer["token_ids"],
        answer["features"]["mm_placeholders"],
    )
    assert decode_item(answer["features"]["kwargs_data"]["audio"][0])["input_features"].array.shape == (128, 3000)
    assert answer["token_ids"].count(processor.audio_token_id) == place["length"]


def test_several_recordings_are_numbered_and_keep_their_order(service, processor):
    recordings = [sound(RATE, seconds, seed=index) for index, seconds in enumerate((0.4, 2.0, 1.1))]
    parts = [input_audio(with_sndfile(samples, RATE, "WAV", "FLOAT")) for samples in recordings]
    messages = [
        *asked(parts[0], text("and"), parts[1]),
        {"role": "assistant", "content": [text("Two bells.")]},
        *asked(parts[2]),
    ]
    answer = service.render(messages)
    check(answer, reference(processor, messages, [samples[:, 0] for samples in recordings]), processor)
    assert [place["length"] for place in answer["features"]["mm_placeholders"]["audio"]] == [10, 50, 27]


def test_a_token_that_is_typed_is_text(service, processor):
    samples = sound(RATE, 1.0)
    data = with_sndfile(samples, RATE, "WAV", "FLOAT")
    plain = service.render(user(text(f"{TOKEN} {TOKEN}")))
    assert plain["features"] is None
    assert processor.audio_token_id not in plain["token_ids"]
    answer = service.render(user(text(f"{TOKEN} is no sound, "), input_audio(data)))
    (place,) = answer["features"]["mm_placeholders"]["audio"]
    assert answer["token_ids"].count(processor.audio_token_id) == place["length"] == 25


# --- payloads ---------------------------------------------------------------------------------------------------------


def test_addresses_hold_the_same_tensors(service, processor):
    samples = sound(RATE, 2.2)
    messages = asked(input_audio(with_sndfile(samples, RATE, "WAV", "FLOAT")))
    expected = reference(processor, messages, [samples[:, 0]])
    with Backend(service.endpoint, id="listener") as backend:
        answer = service.render(messages, mm_payload="shm", backend_id="listener")
        check(answer, expected, processor, tensors=False)
        assert answer["features"]["kwargs_data"] is None
        item = backend.open(answer["features"]["mm_addresses"]["audio"][0])
        with item.view() as arrays:
            assert arrays["input_features"].tobytes() == expected["input_features"][0].tobytes()
            assert not arrays["input_features"].flags.writeable
        copied = item.materialize()
        assert np.array_equal(copied["feature_attention_mask"], expected["feature_attention_mask"][0])
        assert copied["audio_num_tokens"] == 55
        item.release()


@pytest.mark.parametrize("part", ["input_audio", "audio_url"])
@pytest.mark.parametrize("payload", ["shm", "tensors", "none"])
def test_the_native_client_takes_the_bytes_themselves(service, processor, part, payload):
    samples = sound(RATE, 1.5)
    data = with_sndfile(samples, RATE, "WAV", "FLOAT")
    raw = {"data": data, "format": "wav"} if part == "input_audio" else {"url": data}
    messages = asked({"type": part, part: raw})
    expected = reference(processor, messages, [samples[:, 0]])
    with Client(service.endpoint) as client:
        result = client.chat(messages, payload=payload)
        assert list(result.token_ids) == expected["input_ids"][0].tolist()
        (item,) = result.items["audio"]
        assert (item.modality, item.length) == ("audio", 37)
        if payload != "none":
            assert item.materialize()["input_features"].tobytes() == expected["input_features"][0].tobytes()
        result.release()
        with pytest.raises(DecodeError, match="truncated"):
            client.chat(asked({"type": "input_audio", "input_audio": {"data": data[:9000]}}))
        with pytest.raises(InvalidRequest, match="too short"):
            client.chat(
                asked({"type": "audio_url", "audio_url": {"url": with_sndfile(samples[:9], RATE, "WAV", "FLOAT")}})
            )


def test_dtypes_are_those_of_features(service):
    messages = asked(input_audio(encoded("flac-16", sound(RATE, 1.0), RATE)))

    def features(dtype):
        answer = service.render(messages, mm_dtype=dtype)
        return decode_item(answer["features"]["kwargs_data"]["audio"][0])["input_features"]

    exact = features("auto").array
    assert features("float16").array.tobytes() == exact.astype(np.float16).tobytes()
    assert (features("bfloat16").dtype, features("bfloat16").array.nbytes) == ("bfloat16", exact.nbytes // 2)
    refused = service.chat(messages, mm_dtype="uint8")
    assert (refused.status, refused.error["param"]) == (400, "mm_dtype")
    assert "float32, bfloat16, float16, not as uint8" in refused.error["message"]


def test_hits_are_counted_for_recordings(service):
    messages = asked(input_audio(with_sndfile(sound(RATE, 0.9, seed=77), RATE, "WAV", "PCM_24")))

    def counted():
        series = service.metrics()
        names = ("mmprep_mm_cache_queries_total", "mmprep_mm_cache_hits_total", "vllm:mm_cache_hits_total")
        return [series.get(f'{name}{{modality="audio"}}', series.get(name, 0)) for name in names]

    before = counted()
    first, second = service.render(messages), service.render(messages)
    assert first["features"] == second["features"]
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [2, 1, 1]


# --- bad input --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One bad part and the answer to it; by default where the tensors are asked for and where only the plan is."""

    part: Any
    status: int
    words: str
    param: str = PART
    planned: int | None = None


def ten_hours():
    """Return a FLAC of less than 1 MB that holds ten hours of silence."""
    into = io.BytesIO()
    with soundfile.SoundFile(into, "w", 4_000, 1, format="FLAC", subtype="PCM_16") as file:
        minutes = np.zeros(4_000 * 1_200, np.int16)
        for _ in range(30):
            file.write(minutes)
    return into.getvalue()


def patched(data, at, what):
    return data[:at] + what + data[at + len(what) :]


WAV = with_sndfile(sound(RATE, 1.0), RATE, "WAV", "PCM_16")
FLAC = encoded("flac-16", sound(RATE, 2.0), RATE)
TEN_HOURS = (16_000 * 2 * 36_000).to_bytes(4, "little")
URL = "messages[0].content[1].audio_url"
CASES = {
    "0 samples": Case(input_audio(with_sndfile(sound(RATE, 0.0), RATE, "WAV", "PCM_16")), 400, "too short: it has 0"),
    "20 milliseconds": Case(input_audio(with_sndfile(sound(RATE, 0.02), RATE, "WAV", "PCM_16")), 400, "0.020"),
    "0 bytes": Case(data_url(b""), 400, "empty", URL),
    "not base64": Case({"type": "input_audio", "input_audio": {"data": "@@@@"}}, 400, "base64"),
    "no data": Case({"type": "input_audio", "input_audio": {}}, 400, "", "messages[0].content[1].input_audio"),
    "HTML": Case(input_audio(b"<!DOCTYPE html><html>Not found</html>"), 415, "WAV, AIFF, FLAC"),
    "a playlist": Case(data_url(b"#EXTM3U\nhttp://127.0.0.1/a.ts\n"), 415, "WAV, AIFF, FLAC", URL),
    "a picture": Case(input_audio(b"\x89PNG\r\n\x1a\n" + bytes(99)), 415, "not a recording"),
    "W64": Case(input_audio(with_sndfile(sound(), RATE, "W64", "PCM_16")), 415, "not a recording"),
    "a video without sound": Case(input_audio(with_ffmpeg(None, 0, "mp4", None, video="mpeg4")), 415, "no sound"),
    "AC-3": Case(input_audio(with_ffmpeg(sound(48_000, 0.5), 48_000, "mp4", "ac3")), 415, "ac3"),
    "44 bytes that claim ten hours": Case(input_audio(patched(WAV[:44], 40, TEN_HOURS)), 422, "truncated"),
    "a WAV that claims ten hours": Case(input_audio(patched(WAV, 40, TEN_HOURS)), 422, "truncated: its header"),
    "ten hours of silence": Case(input_audio(ten_hours()), 413, "--max-audio-duration"),
    "a FLAC that claims ten hours": Case(input_audio(without_length(FLAC, RATE * 36_000)), 413, "--max-audio-duration"),
    "a FLAC that claims a minute": Case(
        input_audio(without_length(FLAC, RATE * 60)), 422, "broken|truncated", planned=200
    ),
    "64 channels": Case(input_audio(with_sndfile(np.zeros((99, 64)), RATE, "WAV", "PCM_16")), 413, "64 channels.*8"),
    "3 samples a second": Case(input_audio(patched(WAV, 24, b"\x03\x00\x00\x00")), 415, "3 samples a second"),
    "half a WAV": Case(input_audio(WAV[: len(WAV) // 2]), 422, "truncated"),
    "half an RF64": Case(input_audio(encoded("rf64", sound(), RATE)[:9000]), 422, "truncated"),
    "half a FLAC": Case(input_audio(FLAC[: len(FLAC) // 2]), 422, "broken|truncated", planned=200),
    "half an M4A": Case(input_audio(encoded("m4a-aac", sound(), RATE)[:3000]), 422, "broken or truncated"),
    "the head of an Ogg": Case(input_audio(encoded("ogg-opus", sound(), RATE)[:900]), 422, "broken or truncated"),
    "NaN": Case(input_audio(with_sndfile(np.full((9000, 1), np.nan), RATE, "WAV", "FLOAT")), 422, "NaN", planned=200),
    "an option of videos": Case(input_audio(WAV), 400, "'num_frames'", "media_io_kwargs"),
    "a picture for a model that hears": Case(image(WAV), 400, "'image'", "messages[0].content[1].type"),
}


def send(service: Service, name: str, **fields):
    case = CASES[name]
    if name == "an option of videos":
        fields["media_io_kwargs"] = {"audio": {"num_frames": 3}}
    answer = service.chat(asked(case.part), **fields)
    assert not FORBIDDEN.search(answer.body.decode()), answer.body
    return answer


@pytest.mark.parametrize("name", CASES)
def test_a_bad_recording_is_told_what_is_wrong_and_where(service, name):
    case = CASES[name]
    answer = send(service, name)
    assert answer.status == case.status, answer.body
    assert re.search(case.words, answer.error["message"], re.DOTALL), answer.error
    assert answer.error["param"].startswith(case.param), answer.error
    planned = send(service, name, mm_payload="none")
    assert planned.status == (case.planned or case.status), planned.body


def test_too_many_recordings_are_refused(service):
    answer = service.chat(asked(*[input_audio(WAV)] * 5))
    assert (answer.status, answer.error["param"]) == (400, "messages[0].content[5].input_audio")
    assert "At most 4 of modality 'audio'" in answer.error["message"]


def test_bad_recordings_cost_no_process_and_leave_nothing_behind(service):
    pids = service.pids()
    for name in CASES:
        send(service, name)
    for data in (WAV, FLAC, encoded("mp3", sound(RATE, 2.0), RATE), encoded("m4a-aac", sound(RATE, 2.0), RATE)):
        for cut in np.linspace(1, len(data) - 1, 25, dtype=int):
            answer = service.chat(asked(input_audio(data[:cut])))
            assert answer.status in {200, 400, 415, 422}, answer.body
    service.quiet()
    assert service.pids() == pids, "a process of the service was replaced"
    assert service.render(asked(input_audio(WAV)))["features"]["mm_placeholders"]["audio"][0]["length"] == 25


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_limit_of_seconds_is_an_option(model):
    with serving("--max-audio-duration", "2s", "--frontends", 1, "--cache-size", "32MiB", model=model) as service:
        assert service.chat(asked(input_audio(encoded("wav-16", sound(RATE, 2.0), RATE)))).status == 200
        for name in ("wav-16", "mp3", "webm-opus"):
            rate = (FORMATS[name].rates or (RATE,))[-1]
            answer = service.chat(asked(input_audio(encoded(name, sound(rate, 2.6), rate))))
            assert (answer.status, answer.error["type"]) == (413, "PayloadTooLargeError")
            assert "longer than 2 seconds" in answer.error["message"]


def test_another_configuration_is_served_by_the_models_own_processor(tmp_path):
    directory = write_qwen2_audio(tmp_path / "model", padding_value=0.25)
    samples = sound(RATE, 1.3)
    messages = asked(input_audio(with_sndfile(samples, RATE, "WAV", "FLOAT")))
    expected = reference(AutoProcessor.from_pretrained(directory), messages, [samples[:, 0]])
    with serving("--frontends", 1, "--cache-size", "32MiB", model=directory) as service:
        answer = service.render(messages)
    assert answer["token_ids"] == expected["input_ids"][0].tolist()
    fields = decode_item(answer["features"]["kwargs_data"]["audio"][0])
    assert fields["input_features"].array.tobytes() == expected["input_features"][0].tobytes()
