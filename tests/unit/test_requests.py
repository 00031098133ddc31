import json

import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.parts import ImageUrlPart, TextPart
from mmprep_frontend.render.requests import parse


def chat(**fields):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()


def refused(body, kind="chat"):
    with pytest.raises(InvalidRequest) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert caught.value.code == 400
    return caught.value


def test_a_chat_request_is_parsed_with_openai_defaults():
    request = parse(chat(temperature=0.5, stop=["a"], unknown_to_us={"x": 1}, user="u"), "chat")
    assert request.messages[0].content == "hello"
    assert request.add_generation_prompt is True
    assert request.add_special_tokens is False
    assert request.payload == "tensors"
    assert (request.temperature, request.stop) == (0.5, ["a"])


def test_images_come_as_an_object_or_as_a_plain_url():
    parts = [
        {"type": "text", "text": "t"},
        {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
        {"type": "image_url", "image_url": "data:b"},
        {"type": "input_image", "image_url": "data:c", "detail": "auto"},
    ]
    content = parse(chat(messages=[{"role": "user", "content": parts}]), "chat").messages[0].content
    assert isinstance(content[0], TextPart)
    assert isinstance(content[1], ImageUrlPart)
    assert content[1].image_url.url == "data:a"
    assert [part.image_url for part in content[2:]] == ["data:b", "data:c"]


def test_how_media_are_processed_may_be_said_where_it_is_trusted():
    body = chat(mm_processor_kwargs={"max_pixels": 4, "size": {"a": [1.5]}})
    assert parse(body, "chat", trusted=True).mm_processor_kwargs == {"max_pixels": 4, "size": {"a": [1.5]}}
    for wrong in ([], "max_pixels=4", 4, True):
        with pytest.raises(InvalidRequest) as caught:
            parse(chat(mm_processor_kwargs=wrong), "chat", trusted=True)
        assert caught.value.param == "mm_processor_kwargs"


def test_how_media_are_read_may_be_said_where_it_is_trusted():
    body = chat(media_io_kwargs={"video": {"num_frames": 4, "fps": 1.5}})
    assert parse(body, "chat", trusted=True).io == {"video": {"num_frames": 4, "fps": 1.5}}
    with pytest.raises(InvalidRequest) as caught:
        parse(chat(media_io_kwargs={"smell": {}}), "chat", trusted=True)
    assert "smell" in caught.value.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"model": "\xff"}', None),
        (b'{"model": "\\ud800"}', None),
        (b'{"model": "\\udc00x"}', None),
        (b'{"model": "\\ud800\\u0041"}', None),
        (b'{"messages": NaN}', None),
        (b'{"tools": [{"a": ' + b"[" * 100_000, None),
        (b'{"model": "m"}', "messages"),
        (chat(messages=[]), "messages"),
        (chat(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": [{"type": "hologram"}]}]), "messages[0].content[0].type"),
        (chat(messages=[{"role": "user", "content": [{"text": "x"}]}]), "messages[0].content[0].type"),
        (
            chat(
                messages=[
                    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "uuid": 7}]}
                ]
            ),
            "messages[0].content[1].uuid",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "uuid": ""}]}]),
            "messages[0].content[0].uuid",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "uuid": "u" * 1025}]}]),
            "messages[0].content[0].uuid",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]),
            "messages[0].content[0].image_url.url",
        ),
        (chat(temperature=-1), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(n=0), "n"),
        (chat(seed=2**70), "seed"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(cache_salt=""), "cache_salt"),
        (chat(mm_payload="carrier pigeon"), "mm_payload"),
        (chat(mm_payload="shm"), "backend_id"),
        (chat(mm_payload="tensors", return_mm_kwargs=False), "return_mm_kwargs"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(continue_final_message=True), "continue_final_message"),
        (chat(logit_bias={"a": "b"}), "logit_bias"),
    ],
)
def test_what_breaks_the_schema_is_refused_at_its_place(body, param):
    assert refused(body).param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{{ messages }}"),
        ("mm_processor_kwargs", {"max_pixels": 1}),
        ("media_io_kwargs", {"video": {"num_frames": 4}}),
        ("truncate_prompt_tokens", 0),
        ("queue", "no/name"),
        ("functions", [{"name": "f"}]),
    ],
)
def test_what_would_change_the_result_unnoticed_is_refused_by_name(name, value):
    error = refused(chat(**{name: value}))
    assert error.param == name
    assert name in error.message
    assert parse(chat(**{name: None}), "chat").model == "m"


def test_a_request_without_tensors_may_say_so_in_either_way():
    assert parse(chat(mm_payload="none"), "chat").payload == "none"
    assert parse(chat(return_mm_kwargs=False), "chat").payload == "none"
    assert parse(chat(return_mm_kwargs=False, mm_payload="none"), "chat").payload == "none"
    assert parse(chat(mm_payload="shm", backend_id="b"), "chat").payload == "shm"


def test_messages_name_json_types_in_words():
    assert refused(chat(model=3)).message == "model: expected a string or null, got an integer."
    assert refused(b"{}").message == "messages: it is required."


@pytest.mark.parametrize(
    ("prompt", "prompts", "is_batch"),
    [
        ("text", ["text"], False),
        ([1, 2], [[1, 2]], False),
        (["a", "b"], ["a", "b"], True),
        ([[1], [2, 3]], [[1], [2, 3]], True),
    ],
)
def test_a_completion_takes_texts_and_token_lists_alone_and_in_lists(prompt, prompts, is_batch):
    request = parse(json.dumps({"prompt": prompt}).encode(), "completion")
    assert request.prompts() == prompts
    assert request.is_batch is is_batch
    assert request.add_special_tokens is True


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"], [1, [2]]])
def test_a_completion_of_mixed_or_no_prompts_is_refused(prompt):
    assert refused({"prompt": prompt}, "completion").param == "prompt"


def test_tokenize_takes_a_text_or_a_conversation():
    assert parse(b'{"prompt": "x"}', "tokenize").adds_special_tokens is True
    assert parse(b'{"messages": [{"role": "user", "content": "x"}]}', "tokenize").adds_special_tokens is False
    assert refused({}, "tokenize").param == "prompt"
    assert refused({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "tokenize").param == "prompt"
    assert refused({"messages": []}, "tokenize").param == "messages"


def test_detokenize_takes_integers():
    assert parse(b'{"tokens": [1, 2]}', "detokenize").tokens == [1, 2]
    assert refused({"tokens": [1, "2"]}, "detokenize").param == "tokens[1]"
