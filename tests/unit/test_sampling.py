"""Sampling parameters: carried through, defaulted as the model says, and refused where no engine takes them."""

import json

import pytest
from transformers import GenerationConfig

from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.sampling import Defaults, check_against_model, max_tokens, read_defaults, sampling_params

BODIES = {"chat": {"messages": [{"role": "user", "content": "x"}]}, "completion": {"prompt": "x"}}


def parsed(kind="chat", **fields):
    return parse(json.dumps({**BODIES[kind], **fields}).encode(), kind)


def sampled(kind="chat", *, defaults=Defaults(), room=90, **fields):  # noqa: B008 - it is immutable
    return sampling_params(parsed(kind, **fields), room, defaults)


CARRIED = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "temperature": 0.3,
    "top_p": 0.8,
    "top_k": 7,
    "min_p": 0.1,
    "seed": 4,
    "stop": ["a", "b"],
    "stop_token_ids": [3],
    "bad_words": ["c"],
    "ignore_eos": True,
    "min_tokens": 1,
    "prompt_logprobs": 2,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "allowed_token_ids": [1, 2],
    "structured_outputs": {"regex": "a+"},
    "thinking_token_budget": 64,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "stream_interval": 2,
    "watermarking": False,
    "routed_experts_prompt_start": 1,
}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_parameter_is_carried_through_under_its_name(kind):
    assert sampled(kind, max_tokens=5, **CARRIED) == {**CARRIED, "max_tokens": 5}


def test_extra_arguments_and_biases_have_forms_of_their_own():
    params = sampled(vllm_xargs={"a": 1}, logit_bias={"7": -200, "8": 3.5, "9": 101})
    assert params["extra_args"] == {"a": 1}
    assert params["logit_bias"] == {"7": -100.0, "8": 3.5, "9": 100.0}


def test_echo_asks_for_the_log_probabilities_of_the_prompt():
    assert "prompt_logprobs" not in sampled("completion", echo=True)
    assert sampled("completion", echo=True, logprobs=3)["prompt_logprobs"] == 3
    assert sampled(echo=True, logprobs=True, top_logprobs=2)["prompt_logprobs"] == 2
    assert sampled("completion", echo=True, logprobs=3, prompt_logprobs=1)["prompt_logprobs"] == 1


def test_chosen_tokens_take_the_place_of_the_most_likely_ones():
    params = sampled(logprobs=True, top_logprobs=5, logprob_token_ids=[1, 2])
    assert params["logprob_token_ids"] == [1, 2]
    assert "logprobs" not in params


@pytest.mark.parametrize(
    ("kind", "fields", "room", "expected"),
    [
        ("chat", {}, 90, 90),
        ("chat", {"max_tokens": 5}, 90, 5),
        ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, 90, 6),
        ("chat", {"max_tokens": 95}, 90, 90),
        ("completion", {}, 90, 16),
        ("completion", {}, 3, 3),
        ("completion", {"max_tokens": 95}, 90, 90),
    ],
)
def test_the_length_is_what_was_asked_for_and_never_more_than_there_is_room_for(kind, fields, room, expected):
    assert max_tokens(parsed(kind, **fields), room) == expected


def check(request, length=100, vocabulary=1000):
    check_against_model(request, max_model_len=length, vocab_size=vocabulary)


def test_more_tokens_than_the_model_takes_at_all_are_refused_with_both_numbers():
    for kind, field in (("chat", "max_tokens"), ("chat", "max_completion_tokens"), ("completion", "max_tokens")):
        check(parsed(kind, **{field: 100}))
        with pytest.raises(InvalidRequest, match=r"101.*100") as refused:
            check(parsed(kind, **{field: 101}))
        assert refused.value.param == field
        assert field not in str(refused.value)  # other APIs call it otherwise
    check(parsed("completion"), length=10)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids"])
def test_ids_that_the_model_does_not_have_are_refused_at_their_place(kind, name):
    logprobs = {"logprobs": 1 if kind == "completion" else True}
    check(parsed(kind, **{name: [0, 999]}, **logprobs))
    with pytest.raises(InvalidRequest, match=r"1000 is no token id.*0 to 999") as refused:
        check(parsed(kind, **{name: [0, 1000]}, **logprobs))
    assert refused.value.param == f"{name}[1]"


@pytest.mark.parametrize("token", ["1000", "-1"])
def test_a_bias_for_an_id_that_the_model_does_not_have_is_refused(token):
    check(parsed("chat", logit_bias={"0": 1, "999": -1}))
    with pytest.raises(InvalidRequest, match=f"{token} is no token id") as refused:
        check(parsed("chat", logit_bias={"0": 1, token: 1}))
    assert refused.value.param == "logit_bias"


@pytest.mark.parametrize(
    "fields", [{"logit_bias": {"9" * 5000: 1}}, {"logit_bias": {"1.5": 1}}, {"allowed_token_ids": []}], ids=str
)
def test_no_id_and_no_allowed_ids_are_refused(fields):
    with pytest.raises(InvalidRequest) as refused:
        parsed("chat", **fields)
    assert refused.value.param in fields
    assert len(str(refused.value)) < 200


WRITTEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "eos_token_id": [1, 2],
    "transformers_version": "4.40.0",
}


def test_the_models_own_defaults_hold_where_the_request_says_nothing(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({**WRITTEN, "max_new_tokens": 40}))
    defaults = read_defaults(tmp_path)
    reference = GenerationConfig.from_pretrained(tmp_path)
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    expected = {name: getattr(reference, name) for name in names}
    assert sampled(defaults=defaults) == {**expected, "max_tokens": 40}
    assert sampled(defaults=defaults, temperature=0, top_k=-1, max_tokens=3) == {
        **expected,
        "temperature": 0,
        "top_k": -1,
        "max_tokens": 3,
    }
    assert sampled("completion", defaults=defaults) == {**expected, "max_tokens": 16}
    assert max_tokens(parsed(), 30, defaults) == 30


def test_a_model_without_defaults_has_none_and_a_broken_file_stops_the_start(tmp_path):
    assert read_defaults(tmp_path).given() == {}
    for broken in ("{", "[]", '{"temperature": "hot"}'):
        (tmp_path / "generation_config.json").write_text(broken)
        with pytest.raises(StartupError, match=r"generation_config\.json"):
            read_defaults(tmp_path)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"thinking_token_budget": 0.5}, "thinking_token_budget"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": "all"}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"return_token_offsets": "yes"}, "return_token_offsets"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logprob_token_ids": []}, "logprob_token_ids"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_no_engine_takes_is_refused_by_name(kind, fields, param):
    with pytest.raises(InvalidRequest) as refused:
        parsed(kind, **fields)
    assert refused.value.param == param


def test_a_structural_tag_is_handed_on_as_its_text():
    form = {"type": "structural_tag", "format": {"type": "any_text"}}
    assert json.loads(sampled(response_format=form)["structured_outputs"]["structural_tag"]) == form


def test_the_most_likely_tokens_are_told_only_with_log_probabilities():
    for fields in ({"top_logprobs": 3}, {"top_logprobs": -1, "logprobs": False}):
        with pytest.raises(InvalidRequest, match="'logprobs'") as refused:
            parsed("chat", **fields)
        assert refused.value.param == "top_logprobs"
    assert "logprobs" not in sampled(top_logprobs=0)
