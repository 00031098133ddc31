"""Requests of the Responses API: what they become, and where their errors point."""

import json

import msgspec
import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.answer import generate_request
from mmprep_frontend.render.responses import read_responses

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "How it is", "parameters": SCHEMA}
CLOCK = {"type": "function", "name": "clock"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bern"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "warm"}


def body(given="Hi", **fields):
    return json.dumps({"model": "m", "input": given, **fields}).encode()


def asked(given="Hi", **fields):
    return read_responses(body(given, **fields), trusted=False, templates=False)


def converted(given="Hi", **fields):
    """Return the chat's messages as data, without what is not set."""
    plain = json.loads(msgspec.json.encode(asked(given, **fields).request.messages))
    return [{name: value for name, value in message.items() if value is not None} for message in plain]


def answer(**fields):
    request = asked(**fields).request
    told = generate_request(request, request_id="resp_1", model="m", token_ids=[1, 2], max_model_len=1000)
    return json.loads(msgspec.json.encode(told))


def call(name, arguments, identity="c1"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def message(role, content, **more):
    return {"type": "message", "role": role, "content": content, **more}


def thought(words, **more):
    return {
        "type": "reasoning",
        "id": "rs",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": words}],
        **more,
    }


IN_TEXT, OUT_TEXT = {"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}
IN_PICTURE = {"type": "input_image", "image_url": "http://x/y.png", "detail": "auto"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", [{"role": "user", "content": "Hi"}]),
        ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}]),
        ([message("developer", "x")], [{"role": "developer", "content": "x"}]),
        (
            [message("user", [IN_TEXT, IN_PICTURE])],
            [{"role": "user", "content": [IN_TEXT, {**IN_PICTURE, "uuid": None}]}],
        ),
        ([message("assistant", [OUT_TEXT], status="completed")], [{"role": "assistant", "content": "b"}]),
        ([message("assistant", [{"type": "refusal", "refusal": "no"}])], [{"role": "assistant", "content": "no"}]),
        (
            [message("assistant", [OUT_TEXT, OUT_TEXT])],
            [{"role": "assistant", "content": [{"type": "output_text", "text": "b"}] * 2}],
        ),
        (
            [message("user", "q"), thought("hm"), CALL, OUTPUT, message("assistant", "It is warm.")],
            [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "tool_calls": [call("weather", '{"city": "Bern"}')],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "warm"},
                {"role": "assistant", "content": "It is warm."},
            ],
        ),
        (
            [thought("hm"), message("assistant", [OUT_TEXT]), CALL, {**CALL, "call_id": "c2", "namespace": "eu"}],
            [
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "content": "b",
                    "tool_calls": [
                        call("weather", '{"city": "Bern"}'),
                        call("eu__weather", '{"city": "Bern"}', "c2"),
                    ],
                }
            ],
        ),
        (
            [message("assistant", "a"), message("assistant", "b")],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [thought("a"), thought("b")],
            [{"role": "assistant", "reasoning": "a"}, {"role": "assistant", "reasoning": "b"}],
        ),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}],
            [{"role": "assistant", "reasoning": "short"}],
        ),
        (
            [
                {"type": "custom_tool_call", "call_id": "c1", "name": "sh", "input": "ls"},
                {"type": "custom_tool_call_output", "call_id": "c1", "output": [IN_TEXT]},
            ],
            [
                {"role": "assistant", "tool_calls": [call("sh", {"input": "ls"})]},
                {"role": "tool", "tool_call_id": "c1", "content": [IN_TEXT]},
            ],
        ),
    ],
)
def test_items_become_the_messages_of_a_chat(given, expected):
    assert converted(given) == expected


def test_instructions_are_the_systems_first_message():
    assert converted("Hi", instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert converted("Hi", instructions="") == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("given", "is_open"),
    [
        ([message("assistant", "half", status="incomplete")], True),
        ([message("assistant", "half", status="in_progress")], True),
        ([message("assistant", "whole", status="completed")], False),
        ([message("assistant", "half", status="incomplete"), message("user", "go on")], False),
        ([message("assistant", "half", status="incomplete"), OUTPUT], False),
        ("Hi", False),
    ],
)
def test_an_answer_that_is_not_finished_is_continued(given, is_open):
    request = asked(given).request
    assert (request.continue_final_message, request.add_generation_prompt) == (is_open, not is_open)


def test_functions_are_shown_to_the_model_and_what_a_server_runs_is_not():
    custom = {"type": "custom", "name": "sh", "description": "A shell", "format": {"type": "text"}}
    space = {"type": "namespace", "name": "eu", "tools": [CLOCK, {"type": "custom", "name": "x"}]}
    tools = asked(tools=[{**WEATHER, "strict": True}, {"type": "web_search"}, custom, space]).request.tools
    assert tools[0] == {
        "type": "function",
        "function": {"name": "weather", "description": "How it is", "parameters": SCHEMA, "strict": True},
    }
    assert list(tools[0]["function"]) == ["name", "description", "parameters", "strict"]
    assert tools[1]["function"]["name"] == "sh"
    assert tools[1]["function"]["parameters"]["required"] == ["input"]
    assert tools[2] == {"type": "function", "function": {"name": "eu__clock", "description": None, "parameters": None}}
    assert len(tools) == 3
    assert asked(tools=[{"type": "web_search"}]).request.tools is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", None),
        ("none", None),
        ({"type": "function", "name": "weather"}, {"json": SCHEMA}),
        ({"type": "function", "name": "clock"}, {"json": {"type": "object", "properties": {}}}),
        ({"type": "function", "name": "eu__clock"}, {"json": {"type": "object", "properties": {}}}),
    ],
)
def test_a_named_tool_constrains_to_its_parameters(choice, expected):
    space = {"type": "namespace", "name": "eu", "tools": [CLOCK]}
    told = answer(tools=[WEATHER, space], tool_choice=choice)["sampling_params"]
    assert told.get("structured_outputs") == expected


def test_a_required_call_is_a_list_of_calls():
    constraint = answer(tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False)["sampling_params"][
        "structured_outputs"
    ]["json"]
    assert (constraint["type"], constraint["maxItems"]) == ("array", 1)
    assert len(constraint["items"]["anyOf"]) == 2


def test_what_is_said_of_the_answer_is_handed_on():
    told = answer(
        max_output_tokens=30,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["x"],
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        stream=True,
        priority=2,
        store=False,
        user="u",
    )
    assert told["sampling_params"] == {
        "max_tokens": 30,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x"],
        "logprobs": 2,
        "structured_outputs": {"json": SCHEMA},
    }
    assert (told["stream"], told["stream_options"], told["priority"]) == (True, None, 2)
    assert told["parse_context"] is None
    assert answer(top_logprobs=2)["sampling_params"] == {"max_tokens": 998}
    assert answer(text={"format": {"type": "json_object"}})["sampling_params"]["structured_outputs"] == {
        "json_object": True
    }
    assert "structured_outputs" not in answer(text={"format": {"type": "text"}, "verbosity": "low"})["sampling_params"]


def test_truncation_keeps_what_fits_unless_it_is_disabled():
    assert asked().request.truncate_prompt_tokens is None
    assert asked(truncation="disabled").request.truncate_prompt_tokens is None
    assert asked(truncation="auto").request.truncate_prompt_tokens == -1
    assert asked(truncation=None).request.truncate_prompt_tokens == -1
    assert asked(truncation="auto", truncate_prompt_tokens=5).request.truncate_prompt_tokens == 5


def test_an_effort_is_the_templates():
    assert asked(reasoning={"effort": "low", "summary": "auto"}).request.reasoning_effort == "low"
    assert asked(reasoning={}).request.reasoning_effort is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [message("wizard", "x")]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [message("user", [IN_TEXT, {"type": "input_file", "file_id": "f"}])]}, "input[0].content[1].type"),
        ({"input": [message("user", [{"type": "input_image", "image_url": 3}])]}, "input[0].content[0].image_url"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "input[0].content[0].text"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tools": [{"type": "custom", "name": "x", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tools": [{**WEATHER, "parameters": {"$defs": 3}}], "tool_choice": "required"}, "tools[0].parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [CLOCK]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}, "tools": [CLOCK]}, "tool_choice.type"),
        (
            {
                "tool_choice": {"type": "function", "name": "clock"},
                "tools": [{"type": "namespace", "name": name, "tools": [CLOCK]} for name in ("a", "b")],
            },
            "tool_choice.name",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "text.format"),
        ({"truncation": "middle"}, "truncation"),
        ({"temperature": -1}, "temperature"),
        ({"mm_payload": "shm"}, "backend_id"),
    ],
)
def test_what_is_wrong_is_refused_at_the_place_that_was_sent(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        read_responses(json.dumps({"input": "Hi", **fields}).encode(), trusted=False, templates=False)
    assert refused.value.param == param


def test_places_in_the_chat_lead_back_to_the_items():
    items = [message("user", [IN_TEXT, IN_PICTURE]), thought("hm"), {**CALL, "arguments": "{"}, OUTPUT]
    places = asked(items, instructions="Be brief.").places
    for place, original in {
        "messages": "input",
        "messages[1].content[1].image_url": "input[0].content[1].image_url",
        "messages[2]": "input[1]",
        "messages[2].tool_calls[0].function.arguments": "input[2].arguments",
        "messages[3].content[0].image_url": "input[3].output[0].image_url",
        "max_completion_tokens": "max_output_tokens",
    }.items():
        assert places.original(place) == original
