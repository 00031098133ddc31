"""Whatever stands in a request of any API, it is a chat, or refused at a place; nothing else comes out."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, build, card

from mmprep.errors import MmprepError
from mmprep_frontend.render.answer import generate_request
from mmprep_frontend.render.conversation import walk
from mmprep_frontend.render.messages import read_messages
from mmprep_frontend.render.places import Asked
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.responses import read_responses
from mmprep_frontend.render.sentinels import Sentinels
from mmprep_frontend.render.template import ChatTemplate

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "$defs": {"b": {}}}
URL = "data:image/png;base64,AA=="
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": URL}}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": [{"type": "text", "text": "t"}], "tool_call_id": "1"},
        {"role": "developer", "content": "d"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stop": ["a"],
    "logit_bias": {"1": 2},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "truncate_prompt_tokens": 5,
    "truncation_side": "left",
    "documents": [{"a": "b"}],
    "chat_template_kwargs": {"a": 1},
}
MESSAGES = {
    "max_tokens": 2000,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "tool_reference", "tool_name": "f"}]},
            ],
        },
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "system", "content": [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": "f"}}]},
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
    "stop_sequences": ["a"],
}
RESPONSES = {
    "instructions": "i",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": URL}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}], "summary": []},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "namespace": "n"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "t"}]},
        {
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
            "content": [{"type": "output_text", "text": "o"}],
        },
    ],
    "tools": [
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]},
        {"type": "custom", "name": "c"},
    ],
    "tool_choice": {"type": "function", "name": "g"},
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "high"},
    "truncation": "auto",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@st.composite
def changed(draw, right):
    """Return a right request with up to three of its values replaced or taken away."""
    body = copy.deepcopy(right)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(body) if path]))
        outer = body
        for key in path:
            outer = outer[key]
        if draw(st.booleans()) and isinstance(outer, dict):
            del outer[last]
        else:
            outer[last] = draw(anything)
    return json.dumps(body).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return card(build(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def template(model):
    sentinels = Sentinels(model)
    return ChatTemplate({"default": CHAT_TEMPLATE}, {}, sentinels), sentinels


READERS = {
    "chat": (CHAT, lambda body, _: Asked(parse(body, "chat"))),
    "messages": (MESSAGES, lambda body, habits: read_messages(body, habits, trusted=False, templates=False)),
    "responses": (RESPONSES, lambda body, _: read_responses(body, trusted=False, templates=False)),
}


@pytest.mark.parametrize("kind", READERS)
@settings(deadline=None)
@given(data=st.data())
def test_it_is_rendered_or_refused_at_a_place(kind, data, model, template):
    chat_template, sentinels = template
    right, read = READERS[kind]
    body = data.draw(changed(right))
    try:
        asked = read(body, chat_template.habits)
        request = asked.request
        with asked.places.renaming():
            conversation = walk(request.messages, model, chat_template.format_for(request), sentinels)
            assert isinstance(chat_template.render(conversation, request), str)
            generate_request(request, request_id="1", model="m", token_ids=[1], max_model_len=100)
    except MmprepError as refused:
        told = refused
    else:
        return
    assert told.code in (400, 413)
    top = (told.param or "").partition(".")[0].partition("[")[0]
    assert top in {"", *right, *json.loads(body), "messages", "input", "model", "max_tokens", "continue_final_message"}


@pytest.mark.parametrize("kind", READERS)
def test_the_requests_that_are_changed_are_right(kind, model, template):
    chat_template, sentinels = template
    right, read = READERS[kind]
    request = read(json.dumps(right).encode(), chat_template.habits).request
    assert walk(request.messages, model, chat_template.format_for(request), sentinels).media
