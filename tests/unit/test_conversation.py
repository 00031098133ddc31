import json

import jinja2
import pytest
from tiny_tokenizer import CHAT_TEMPLATE, STRING_TEMPLATE, build, card

from mmprep.card import ModelCard, Placeholder
from mmprep.errors import InvalidRequest
from mmprep_frontend.render.conversation import MediaPart, detect_format, walk
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.sentinels import Sentinels

MODALITIES = ("image", "video", "audio")
TAKES_ALL = ModelCard("any", b"", tuple(Placeholder(m, f"<{m}>", 7, f"<{m}>") for m in MODALITIES), {}, {})
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return card(build(tmp_path_factory.mktemp("model")))


def walked(messages, model, content_format="both"):
    request = parse(json.dumps({"messages": messages}).encode(), "chat")
    return walk(request.messages, model, content_format, Sentinels(model))


def test_media_are_taken_out_in_order_with_their_places(model):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}, PICTURE]},
    ]
    conversation = walked(messages, model)
    assert conversation.media == [
        MediaPart("image", PICTURE["image_url"]["url"], "messages[0].content[1].image_url"),
        MediaPart("image", "http://x/", "messages[1].content[0].image_url"),
        MediaPart("image", PICTURE["image_url"]["url"], "messages[1].content[1].image_url"),
    ]
    assert conversation.messages[0]["content"] == [{"type": "text", "text": "a"}, {"type": "image", "image": ""}]
    assert conversation.sentinels == 0


def test_videos_and_recordings_are_taken_out_like_pictures():
    parts = [
        {"type": "video_url", "video_url": {"url": "http://v/"}},
        {"type": "audio_url", "audio_url": "http://a/"},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ]
    conversation = walked([{"role": "user", "content": parts}], TAKES_ALL)
    assert conversation.media == [
        MediaPart("video", "http://v/", "messages[0].content[0].video_url"),
        MediaPart("audio", "http://a/", "messages[0].content[1].audio_url"),
        MediaPart("audio", "AA==", "messages[0].content[2].input_audio", bare=True),
    ]
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["video", "audio", "audio"]


KINDS = [
    ("image_url", "image_url", "image"),
    ("input_image", "image_url", "image"),
    ("video_url", "video_url", "video"),
    ("audio_url", "audio_url", "audio"),
    ("input_audio", "input_audio", "audio"),
]


@pytest.mark.parametrize(("kind", "name", "modality"), KINDS, ids=[kind for kind, _, _ in KINDS])
@pytest.mark.parametrize("data", ["missing", None, {}, {"url": None, "data": None}, {"url": "", "data": ""}], ids=repr)
def test_the_data_of_every_medium_may_be_absent_where_it_has_a_uuid(kind, name, modality, data):
    part = {"type": kind} if data == "missing" else {"type": kind, name: data}
    (medium,) = walked([{"role": "user", "content": [{**part, "uuid": "u"}]}], TAKES_ALL).media
    assert (medium.modality, medium.url, medium.uuid) == (modality, "", "u")
    assert medium.param == "messages[0].content[0].uuid"
    with pytest.raises(InvalidRequest, match="no data: send them, or the 'uuid'") as caught:
        walked([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}], TAKES_ALL)
    assert caught.value.param == f"messages[0].content[1].{name}"


def test_a_medium_with_data_keeps_its_uuid_and_names_its_data(model):
    (medium,) = walked([{"role": "user", "content": [{**PICTURE, "uuid": "https://a/cat.png"}]}], model).media
    place = "messages[0].content[0].image_url"
    assert medium == MediaPart("image", PICTURE["image_url"]["url"], place, uuid="https://a/cat.png")


def test_a_string_template_gets_joined_text_with_sentinels(model):
    messages = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    conversation = walked(messages, model, "string")
    content = conversation.messages[0]["content"]
    assert "<|image_pad|>" not in content
    assert content.startswith("<|vision_start|>")
    assert content.endswith("<|vision_end|>\na\nb")
    assert conversation.sentinels == 1


def test_a_template_of_parts_gets_strings_as_parts(model):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert [m["content"] for m in walked(messages, model, "parts").messages] == [[{"type": "text", "text": "a"}], []]
    assert [m["content"] for m in walked(messages, model, "both").messages] == ["a", ""]


def test_tool_calls_get_their_arguments_as_objects(model):
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2.5, null]}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"function": {"name": "h", "arguments": {"x": 1}}},
    ]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
    ]
    converted = walked(messages, model).messages
    functions = [call["function"] for call in converted[1]["tool_calls"]]
    assert [f["arguments"] for f in functions] == [{"b": 1, "a": [2.5, None]}, {}, {"x": 1}]
    assert converted[2] == {"role": "tool", "content": "r", "name": "f", "tool_call_id": "1"}


def test_reasoning_is_given_under_every_name_that_templates_read(model):
    converted = walked([{"role": "assistant", "content": "c", "reasoning": "why"}], model).messages[0]
    assert converted["reasoning_content"] == converted["thinking"] == converted["reasoning"] == "why"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "audio_url", "audio_url": "http://x/"}]}],
            "messages[0].content[0].type",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA=="}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "A"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "image_url", "uuid": None}]}], "messages[0].content[0].image_url"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}], "messages[0].content[0].image_url"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused_at_its_place(messages, param, model):
    with pytest.raises(InvalidRequest) as caught:
        walked(messages, model)
    assert caught.value.param == param


def test_a_model_without_images_refuses_them():
    with pytest.raises(InvalidRequest, match="takes no media of modality 'image'"):
        walked([{"role": "user", "content": [PICTURE]}], ModelCard("text", b"", (), {}, {}))


@pytest.mark.parametrize(
    ("source", "content_format"),
    [
        (CHAT_TEMPLATE, "both"),
        (STRING_TEMPLATE, "string"),
        ("{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% for c in m.content | selectattr('type') %}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}{% endfor %}{% endfor %}", "parts"),
        (
            """{% macro show(body) %}{% if body is string %}{% else %}{% for p in body %}{% endfor %}{% endif %}
            {% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}""",
            "both",
        ),
        ("{% for m in messages %}{{ m.content.split('x')[-1] }}{% for t in tools %}{% endfor %}{% endfor %}", "string"),
        (
            (
                "{% for m in messages %}{% set parts = [m.content] if m.content is string else m.content %}"
                "{% for p in parts %}{{ p }}{% endfor %}{% endfor %}"
            ),
            "both",
        ),
    ],
)
def test_what_a_template_takes_is_read_from_its_syntax(source, content_format):
    assert detect_format(jinja2.Environment().parse(source)) == content_format


def test_parts_of_other_apis_are_texts_among_texts(model):
    parts = [
        "plain",
        {"type": "input_text", "text": "asked"},
        {"type": "output_text", "text": "answered"},
        {"type": "thinking", "thinking": "thought"},
        {"type": "refusal", "refusal": "refused"},
        {"type": "tool_reference", "name": "clock"},
    ]
    messages = [{"role": "user", "content": parts}]
    words = ["plain", "asked", "answered", "thought", "refused"]
    expected = [{"type": "text", "text": word} for word in words]
    assert walked(messages, model).messages[0]["content"] == [*expected, {"type": "tool_reference", "name": "clock"}]
    assert walked(messages, model, "string").messages[0]["content"] == "\n".join([*words, "clock"])


@pytest.mark.parametrize("content_format", ["string", "parts", "both"])
def test_what_a_tool_answered_is_one_text_unless_there_is_more_to_it(content_format, model):
    def answered(content):
        return walked([{"role": "tool", "content": content}], model, content_format).messages[0]["content"]

    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert answered("a") == "a"
    assert answered("") == ""
    assert answered(texts) == "a\nb"
    if content_format != "string":
        assert answered([texts[0], PICTURE]) == [texts[0], {"type": "image", "image": ""}]


def test_a_coding_clients_line_is_left_out_of_what_the_system_says(model):
    mark = "x-anthropic-billing-header: cch=1"

    def said(content, role="system"):
        return walked([{"role": role, "content": content}], model).messages[0]["content"]

    def part(text):
        return {"type": "text", "text": text}

    assert said(f"{mark}\nBe brief.") == "Be brief."
    assert said(mark) == ""
    assert said([part(mark), part("a"), part(f"{mark}\nb")]) == [part("a"), part("b")]
    assert said([part("a"), part("")]) == [part("a"), part("")]
    assert said(mark, "user") == mark
