"""What a choice of tools asks of the generation. The schemas are written out here, as engines' parsers read them."""

import json

import msgspec
import pytest

from mmprep.errors import InvalidRequest
from mmprep_frontend.render.answer import generate_request
from mmprep_frontend.render.requests import parse

POINT = {"type": "object", "properties": {"x": {"type": "number"}}}


def tool(name, parameters=None, **more):
    return {
        "type": "function",
        "function": {"name": name, **({} if parameters is None else {"parameters": parameters}), **more},
    }


WEATHER = tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
CLOCK = tool("clock")
PLOT = tool("plot", {"type": "object", "properties": {"at": {"$ref": "#/$defs/Point"}}, "$defs": {"Point": POINT}})


def body(**fields):
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


def answered(**fields):
    request = parse(body(**fields), "chat")
    answer = generate_request(request, request_id="c", model="m", token_ids=[1, 2], max_model_len=50)
    return json.loads(msgspec.json.encode(answer))


def constrained(**fields):
    return answered(**fields)["sampling_params"].get("structured_outputs")


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_a_free_choice_constrains_nothing(choice):
    assert constrained(tools=[WEATHER, CLOCK], tool_choice=choice) is None


def test_a_named_tool_constrains_to_its_parameters():
    assert constrained(tools=[WEATHER, CLOCK], tool_choice=named("weather")) == {
        "json": WEATHER["function"]["parameters"]
    }
    assert constrained(tools=[WEATHER, CLOCK], tool_choice=named("clock")) == {
        "json": {"type": "object", "properties": {}}
    }


def call(name, parameters):
    return {
        "properties": {"name": {"type": "string", "enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
    }


def test_a_required_call_is_a_list_of_calls_of_any_of_the_tools():
    expected = {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "anyOf": [
                call("weather", WEATHER["function"]["parameters"]),
                call("clock", {"type": "object", "properties": {}}),
            ],
        },
    }
    tools = [WEATHER, CLOCK]
    assert constrained(tools=tools, tool_choice="required") == {"json": expected}
    assert constrained(tools=tools, tool_choice="required", parallel_tool_calls=True) == {"json": expected}
    assert constrained(tools=tools, tool_choice="required", parallel_tool_calls=False) == {
        "json": {**expected, "maxItems": 1}
    }


def test_definitions_move_to_the_root_where_references_look_for_them():
    schema = constrained(tools=[PLOT, WEATHER], tool_choice="required")["json"]
    assert schema["$defs"] == {"Point": POINT}
    assert schema["items"]["anyOf"][0] == call(
        "plot", {"type": "object", "properties": {"at": {"$ref": "#/$defs/Point"}}}
    )
    assert constrained(tools=[PLOT], tool_choice=named("plot")) == {"json": PLOT["function"]["parameters"]}


def test_a_call_that_must_be_made_overrides_a_response_format():
    form = {"type": "json_object"}
    assert constrained(tools=[CLOCK], tool_choice="required", response_format=form)["json"]["type"] == "array"
    assert constrained(tools=[CLOCK], tool_choice="auto", response_format=form) == {"json_object": True}
    assert constrained(tools=[CLOCK], tool_choice="required", structured_outputs={"structural_tag": "{}"}) == {
        "structural_tag": "{}"
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("clock")}, "tool_choice"),
        ({"tool_choice": named("other"), "tools": [CLOCK]}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [CLOCK]}, "tool_choice"),
        ({"tool_choice": 3, "tools": [CLOCK]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [CLOCK]}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {}}, "tools": [CLOCK]}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "code", "function": {"name": "clock"}}, "tools": [CLOCK]}, "tool_choice.type"),
        ({"tool_choice": "required", "tools": [CLOCK, {"type": "function"}]}, "tools[1].function.name"),
        ({"tool_choice": "required", "tools": [tool("")]}, "tools[0].function.name"),
        ({"tool_choice": "required", "tools": [tool("x", "string")]}, "tools[0].function.parameters"),
        ({"tool_choice": "required", "tools": [tool("x", {"$defs": 3})]}, "tools[0].function.parameters"),
        (
            {"tool_choice": "required", "tools": [PLOT, tool("y", {"$defs": {"Point": {"type": "null"}}})]},
            "tools[1].function.parameters",
        ),
        ({"tools": "all"}, "tools"),
        ({"tools": ["clock"]}, "tools[0]"),
        (
            {"tools": [CLOCK], "tool_choice": named("clock"), "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
    ],
)
def test_a_choice_that_the_tools_do_not_allow_is_refused_at_its_place(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        parse(body(**fields), "chat")
    assert refused.value.param == param


def test_the_engine_is_told_what_it_needs_to_parse_the_answer():
    history = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}] * 2},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
        {"role": "user", "content": "and now?"},
    ]
    context = answered(messages=history, tools=[CLOCK], reasoning_effort="none", chat_template_kwargs={"a": 1})[
        "parse_context"
    ]
    assert context == {
        "tools": [CLOCK],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "include_reasoning": True,
        "chat_template_kwargs": {
            "a": 1,
            "enable_thinking": False,
            "reasoning_effort": "none",
            "add_generation_prompt": True,
            "continue_final_message": False,
        },
        "history_tool_call_cnt": 2,
    }
    plain = answered()["parse_context"]
    assert (plain["tools"], plain["tool_choice"], plain["history_tool_call_cnt"]) == (None, "none", 0)
    assert answered(tools=[CLOCK], tool_choice=named("clock"))["parse_context"]["tool_choice"] == named("clock")
    assert answered()["reasoning_ended"] is None
    assert answered(include_reasoning=False)["reasoning_ended"] is True
