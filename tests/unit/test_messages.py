"""Requests of the Messages API: what they become, and where their errors point."""

import json

import msgspec
import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.answer import generate_request
from mmprep_frontend.render.messages import read_messages
from mmprep_frontend.render.template import Habits

USUAL = Habits(late_system=True, quiet_effort="none")
STRICT = Habits(late_system=False, quiet_effort="low")
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
REMOTE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "How it is", "input_schema": SCHEMA}
ASK = [{"role": "user", "content": "Hi"}]


def body(messages=ASK, **fields):
    return json.dumps({"model": "m", "max_tokens": 64, "messages": messages, **fields}).encode()


def asked(messages=ASK, habits=USUAL, **fields):
    return read_messages(body(messages, **fields), habits, trusted=False, templates=False)


def converted(messages=ASK, habits=USUAL, **fields):
    """Return the chat's messages as data, without what is not set."""
    request = asked(messages, habits, **fields).request
    plain = json.loads(msgspec.json.encode(request.messages))
    return [{name: value for name, value in message.items() if value is not None} for message in plain]


def text(words):
    return {"type": "text", "text": words}


def picture(url):
    return {"type": "image_url", "image_url": url, "uuid": None}


def answer(**fields):
    request = asked(**fields).request
    told = generate_request(request, request_id="chatcmpl-1", model="m", token_ids=[1], max_model_len=1000)
    return json.loads(msgspec.json.encode(told))


DATA = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (ASK, [{"role": "user", "content": "Hi"}]),
        ([{"role": "user", "content": [text("Hi")]}], [{"role": "user", "content": "Hi"}]),
        (
            [{"role": "user", "content": [PICTURE, text("What?"), text(""), REMOTE]}],
            [{"role": "user", "content": [picture(DATA), text("What?"), picture("http://x/y.png")]}],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "Hm. ", "signature": "s"}, text("A")],
                },
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "B"}]},
                {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, text("C")]},
            ],
            [
                {"role": "assistant", "content": "A", "reasoning": "Hm. "},
                {"role": "assistant", "reasoning": "B"},
                {"role": "assistant", "content": "C"},
            ],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"a": 1}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "warm"}]},
            ],
            [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
                    ],
                },
                {"role": "tool", "tool_call_id": "t1", "content": "warm"},
            ],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        text("see"),
                        {"type": "tool_result", "tool_use_id": "t1", "content": [text("a"), PICTURE, text("b")]},
                        {"type": "tool_result", "tool_use_id": "t2"},
                    ],
                }
            ],
            [
                {"role": "tool", "tool_call_id": "t1", "content": "a\nb"},
                {"role": "user", "content": [picture(DATA)]},
                {"role": "tool", "tool_call_id": "t2", "content": ""},
                {"role": "user", "content": "see"},
            ],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t1",
                            "content": [{"type": "tool_reference", "tool_name": "clock"}],
                        }
                    ],
                }
            ],
            [
                {"role": "tool", "tool_call_id": "t1", "content": ""},
                {"role": "tool", "tool_call_id": "t1", "content": [{"type": "tool_reference", "name": "clock"}]},
            ],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": [text("x"), text("y")]}],
                }
            ],
            [{"role": "assistant", "content": "Tool result: x\ny"}],
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": [text("be"), text(" brief")]}],
            [{"role": "user", "content": "a"}, {"role": "system", "content": "be brief"}],
        ),
    ],
)
def test_messages_become_those_of_a_chat(messages, expected):
    assert converted(messages) == expected


def test_the_system_speaks_first_and_all_at_once_where_the_template_takes_no_later_word():
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}]
    assert converted(messages, system="early") == [
        {"role": "system", "content": "early"},
        {"role": "user", "content": "a"},
        {"role": "system", "content": "late"},
    ]
    assert converted(messages, STRICT, system=[text("ear"), text("ly")]) == [
        {"role": "system", "content": "earlylate"},
        {"role": "user", "content": "a"},
    ]
    assert converted(messages, STRICT) == [{"role": "system", "content": "late"}, {"role": "user", "content": "a"}]


def test_the_line_that_a_coding_client_puts_in_front_is_left_out():
    mark = "x-anthropic-billing-header: cch=1"
    assert converted(system=[text(mark), text("be brief")]) == [{"role": "system", "content": "be brief"}, *ASK]
    assert converted(system=[text(mark)]) == ASK


def test_tools_become_functions_with_a_schema_of_an_object():
    bare = {"name": "clock", "input_schema": {"properties": {}}, "strict": True}
    assert asked(tools=[WEATHER, bare]).request.tools == [
        {"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": SCHEMA}},
        {
            "type": "function",
            "function": {
                "name": "clock",
                "description": None,
                "parameters": {"properties": {}, "type": "object"},
                "strict": True,
            },
        },
    ]
    assert asked(tools=[]).request.tools is None


def change(kind, tool):
    return {"role": "system", "content": [{"type": kind, "tool": tool}]}


def test_tools_are_those_at_the_end_of_the_conversation():
    clock = {"name": "clock", "input_schema": {"type": "object"}}
    named = {"type": "tool_reference", "name": "weather"}

    def names(*changes, tools=(WEATHER,)):
        request = asked([*ASK, *changes], tools=list(tools)).request
        return [tool["function"]["name"] for tool in request.tools or ()]

    assert names(change("tool_addition", {"type": "tool_definition", "definition": clock})) == ["weather", "clock"]
    assert names(change("tool_removal", named)) == []
    assert names(change("tool_removal", named), change("tool_addition", named)) == ["weather"]
    deferred = {**WEATHER, "defer_loading": True}
    assert asked(tools=[deferred]).request.tools[0]["function"]["defer_loading"] is True
    assert (
        "defer_loading"
        not in asked([*ASK, change("tool_addition", named)], tools=[deferred]).request.tools[0]["function"]
    )


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto"}, "auto", True),
        ({"type": "none"}, "none", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, True),
    ],
)
def test_choices_are_those_of_a_chat_in_other_words(choice, expected, parallel):
    context = answer(tools=[WEATHER], tool_choice=choice)["parse_context"]
    assert (context["tool_choice"], context["parallel_tool_calls"]) == (expected, parallel)


def test_a_tool_that_must_be_called_constrains_the_answer():
    named = answer(tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"})
    assert named["sampling_params"]["structured_outputs"] == {"json": SCHEMA}
    some = answer(tools=[WEATHER], tool_choice={"type": "any"})
    assert some["sampling_params"]["structured_outputs"]["json"]["type"] == "array"


def test_what_is_said_of_the_answer_is_handed_on():
    told = answer(
        stop_sequences=["END"],
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        stream=True,
        metadata={"user_id": "u"},
        cache_salt="s",
        mm_payload="none",
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        thinking={"type": "enabled", "budget_tokens": 1024},
        max_tokens=2000,
    )
    assert told["sampling_params"] == {
        "stop": ["END"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "max_tokens": 999,
        "structured_outputs": {"json": SCHEMA},
        "thinking_token_budget": 1024,
    }
    assert told["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert told["cache_salt"] == "s"


def test_effort_and_thinking_decide_what_the_template_is_told():
    assert asked(output_config={"effort": "xhigh"}).request.reasoning_effort == "xhigh"
    assert asked(thinking={"type": "adaptive"}).request.reasoning_effort is None
    off = {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}
    assert asked(**off).request.reasoning_effort == "none"
    assert asked(habits=STRICT, **off).request.reasoning_effort == "low"


def with_block(block, role="user"):
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": [text("b"), block]}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (with_block({"type": "hologram"}), "messages[1].content[1].type"),
        (with_block({"type": "image"}), "messages[1].content[1].source"),
        (
            with_block({"type": "image", "source": {"type": "file", "file_id": "f"}}),
            "messages[1].content[1].source.type",
        ),
        (with_block({"type": "image", "source": {"type": "base64"}}), "messages[1].content[1].source.data"),
        (with_block({"type": "image", "source": {"type": "url", "url": ""}}), "messages[1].content[1].source.url"),
        (with_block({"type": "tool_use", "input": {}}, "assistant"), "messages[1].content[1].name"),
        (with_block({"type": "tool_use", "name": "f", "input": "x"}, "assistant"), "messages[1].content[1].input"),
        (
            with_block({"type": "tool_result", "content": [{"type": "document"}]}),
            "messages[1].content[1].content[0].type",
        ),
        (
            with_block({"type": "tool_result", "content": [PICTURE]}, "assistant"),
            "messages[1].content[1].content[0]",
        ),
        (
            with_block({"type": "tool_removal", "tool": {"type": "tool_reference", "name": "x"}}, "system"),
            "messages[1].content[1].tool.name",
        ),
        (
            {
                **with_block({"type": "tool_removal", "tool": {"type": "tool_reference", "name": "weather"}}),
                "tools": [WEATHER],
            },
            "messages[1].content[1]",
        ),
        ({"system": [PICTURE]}, "system[0].type"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name"),
        (
            {"tools": [{**WEATHER, "input_schema": {"$defs": 3}}], "tool_choice": {"type": "any"}},
            "tools[0].input_schema",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"mm_payload": "shm"}, "backend_id"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)
def test_what_is_wrong_is_refused_at_the_place_that_was_sent(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        read_messages(body(**{"messages": ASK, **fields}), USUAL, trusted=False, templates=False)
    assert refused.value.param == param


def test_places_in_the_chat_lead_back_to_the_blocks():
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [text("x"), PICTURE]},
                text("b"),
                REMOTE,
            ],
        },
    ]
    places = asked(messages, system="s").places
    assert places.original("messages[0].content") == "system.content"
    assert places.original("messages[3].content[0].image_url") == "messages[1].content[0].content[1].source"
    assert places.original("messages[4].content[1].image_url") == "messages[1].content[2].source"
    assert places.original("max_completion_tokens") == "max_tokens"
