"""The whole request surface over HTTP: other APIs, template semantics and lengths, against transformers."""

import base64
import json
import threading

import numpy as np
import pytest
from PIL import Image
from tests.integration.service import DATA, photo, serving, text, user
from tests.models import write_qwen2_vl
from transformers import AutoImageProcessor, AutoTokenizer

from mmprep import embedded

PAD = "<|image_pad|>"
MESSAGES, RESPONSES = "/v1/messages/render", "/v1/responses/render"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "How it is there", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
PICTURE = {"type": "image"}


@pytest.fixture(scope="module")
def service():
    with serving("--cache-size", "64MiB", "--frontends", "1") as running:
        yield running


class Reference:
    """What transformers makes of a conversation with pictures, for the embedded model."""

    def __init__(self, directory):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.processor = AutoImageProcessor.from_pretrained(directory)

    def text(self, messages, **options):
        options.setdefault("add_generation_prompt", True)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(self, messages, *pictures, **options):
        first, *rest = self.text(messages, **options).split(PAD)
        prompt = first
        for name, piece in zip(pictures, rest, strict=True):
            picture = Image.open(DATA / name).convert("RGB")
            grid = self.processor(images=[picture], return_tensors="np")["image_grid_thw"]
            prompt += PAD * (int(np.prod(grid)) // 4) + piece
        return self.tokenizer(prompt, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def reference():
    return Reference(embedded.path())


def encoded(name):
    return base64.b64encode((DATA / name).read_bytes()).decode()


def anthropic(name):
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(name)}}


def rendered(service, path, body):
    answer = service.post(path, body)
    assert answer.status == 200, answer.body
    return answer.json


# --- the Messages API -------------------------------------------------------------------------------------------------


def test_a_messages_request_becomes_the_ids_ranges_and_tensors_of_the_same_chat(service, reference):
    body = {
        "model": "mmprep-demo",
        "max_tokens": 100,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": [anthropic("cat.png"), text("What is this?")]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [text("And this?"), anthropic("rocket.jpg")]},
        ],
        "stop_sequences": ["END"],
    }
    answer = rendered(service, MESSAGES, body)
    assert answer["request_id"].startswith("chatcmpl-")
    assert answer["sampling_params"] == {"stop": ["END"], "max_tokens": 100}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [PICTURE, text("What is this?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And this?"), PICTURE]},
    ]
    assert answer["token_ids"] == reference.ids(chat, "cat.png", "rocket.jpg")
    same = service.render(
        [
            {"role": "system", "content": "Be brief."},
            *user(photo("cat.png"), text("What is this?")),
            {"role": "assistant", "content": "A cat."},
            *user(text("And this?"), photo("rocket.jpg")),
        ]
    )
    assert answer["features"] == same["features"]
    assert set(answer) == set(same)


def test_tools_and_their_results_reach_the_template_from_a_messages_request(service, reference):
    body = {
        "model": "mmprep-demo",
        "max_tokens": 100,
        "tools": [{"name": "weather", "description": "How it is there", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "weather"},
        "messages": [
            {"role": "user", "content": "How is Bern?"},
            {
                "role": "assistant",
                "content": [
                    text("I look."),
                    {"type": "tool_use", "id": "t", "name": "weather", "input": {"city": "Bern"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [text("warm"), anthropic("cat.png")]}
                ],
            },
        ],
    }
    answer = rendered(service, MESSAGES, body)
    call = {"id": "t", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    chat = [
        {"role": "user", "content": "How is Bern?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "warm", "tool_call_id": "t"},
        {"role": "user", "content": [PICTURE]},
    ]
    assert answer["token_ids"] == reference.ids(chat, "cat.png", tools=[TOOL])
    assert answer["sampling_params"]["structured_outputs"] == {"json": SCHEMA}
    assert answer["parse_context"]["history_tool_call_cnt"] == 1


# --- the Responses API ------------------------------------------------------------------------------------------------


def test_a_responses_request_becomes_the_ids_and_ranges_of_the_same_chat(service, reference):
    url = photo("cat.png")["image_url"]["url"]
    body = {
        "model": "mmprep-demo",
        "instructions": "Be brief.",
        "tools": [{"type": "function", **FUNCTION}],
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Where?"}],
            },
            {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Bern"}'},
            {"type": "function_call_output", "call_id": "c", "output": "warm"},
            {"role": "user", "content": "Well?"},
        ],
        "max_output_tokens": 50,
        "text": {"format": {"type": "json_object"}},
    }
    answer = rendered(service, RESPONSES, body)
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [PICTURE, text("Where?")]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "warm", "tool_call_id": "c"},
        {"role": "user", "content": "Well?"},
    ]
    assert answer["request_id"].startswith("resp_")
    assert answer["token_ids"] == reference.ids(chat, "cat.png", tools=[TOOL])
    assert answer["sampling_params"] == {"max_tokens": 50, "structured_outputs": {"json_object": True}}
    hashes = service.render(user(photo("cat.png"), text("?")), mm_payload="none")["features"]["mm_hashes"]
    assert answer["features"]["mm_hashes"] == hashes


def test_a_text_is_a_response_too_and_the_clients_id_is_kept(service, reference):
    answer = service.post(RESPONSES, {"input": "Hello"}, X_Request_Id="mine")
    assert answer.json["request_id"] == "resp_mine"
    assert answer.json["token_ids"] == reference.ids([{"role": "user", "content": "Hello"}])
    assert (
        service.post(RESPONSES, {"input": "x", "previous_response_id": "resp_1"}).error["param"]
        == "previous_response_id"
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (
            MESSAGES,
            {
                "max_tokens": 9,
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "user",
                        "content": [text("b"), {"type": "image", "source": {"type": "base64", "data": "?"}}],
                    },
                ],
            },
            400,
            "messages[1].content[1].source",
        ),
        (
            MESSAGES,
            {
                "max_tokens": 9,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [text("x"), {"type": "image", "source": {"type": "url", "url": "ftp://x/"}}],
                            }
                        ],
                    }
                ],
            },
            400,
            "messages[0].content[0].content[1].source",
        ),
        (
            RESPONSES,
            {
                "instructions": "x",
                "input": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]},
                ],
            },
            415,
            "input[1].content[0].image_url",
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
            400,
            "input[0].arguments",
        ),
        (MESSAGES, {"max_tokens": 99_999, "messages": [{"role": "user", "content": "a"}]}, 400, "max_tokens"),
        (RESPONSES, {"max_output_tokens": 99_999, "input": "a"}, 400, "max_output_tokens"),
        (RESPONSES, {"model": "other", "input": "a"}, 404, "model"),
    ],
)
def test_errors_point_to_the_place_that_was_sent(service, path, body, status, param):
    answer = service.post(path, body)
    assert answer.status == status
    assert answer.error["param"] == param


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_conversation_with_tools_is_rendered_as_transformers_does(service, reference):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "2"}]},
        {"role": "tool", "content": "warm", "tool_call_id": "1"},
        {"role": "tool", "content": "cold", "tool_call_id": "2"},
    ]
    sent = json.loads(json.dumps(messages))
    for one in sent[2]["tool_calls"]:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    sent[3]["content"] = [text("warm")]
    for choice in ("auto", "none", "required"):
        answer = service.render(sent, tools=[TOOL], tool_choice=choice)
        assert answer["token_ids"] == reference.ids(
            [{**m, "content": m["content"] or ""} for m in messages], tools=[TOOL]
        )


def test_a_final_message_is_continued_as_transformers_does(service, reference):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    answer = service.render(messages, continue_final_message=True, add_generation_prompt=False)
    expected = reference.ids(messages, continue_final_message=True, add_generation_prompt=False)
    assert answer["token_ids"] == expected
    body = {"input": [messages[0], {**messages[1], "type": "message", "status": "incomplete"}]}
    assert rendered(service, RESPONSES, body)["token_ids"] == expected
    assert service.render(messages, add_generation_prompt=False)["token_ids"] == reference.ids(
        messages, add_generation_prompt=False
    )


# --- lengths ----------------------------------------------------------------------------------------------------------

LONG = [{"role": "user", "content": "Tell me about the cat and the rocket, one after the other, in some detail."}]


@pytest.mark.parametrize("kept", [1, 7, 20, 10_000, -1])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_text_is_cut_to_its_first_or_last_tokens_wherever_it_is_sent(service, reference, kept, side):
    def cut(ids):
        return ids if kept in (-1, 10_000) else ids[-kept:] if side == "left" else ids[:kept]

    fields = {"truncate_prompt_tokens": kept, "truncation_side": side}
    expected = cut(reference.ids(LONG))
    assert service.render(LONG, **fields)["token_ids"] == expected
    assert service.post("/tokenize", {"messages": LONG, **fields}).json["tokens"] == expected
    words = LONG[0]["content"]
    ids = reference.tokenizer(words).input_ids
    assert service.post("/tokenize", {"prompt": words, **fields}).json["tokens"] == cut(ids)
    for prompt in (words, ids):
        (answer,) = service.post("/v1/completions/render", {"prompt": prompt, **fields}).json
        assert answer["token_ids"] == cut(ids)


def test_the_largest_cut_leaves_room_for_one_token(reference):
    with serving("--cache-size", "64MiB", "--frontends", "1", "--max-model-len", "16") as service:
        ids = reference.ids(LONG)
        answer = service.render(LONG, truncate_prompt_tokens=-1)
        assert answer["token_ids"] == ids[:15]
        assert answer["sampling_params"] == {"max_tokens": 1}
        last = rendered(service, RESPONSES, {"input": LONG, "truncation": "auto"})
        assert last["token_ids"] == ids[:15]
        error = service.chat(LONG).error
        assert f"{len(ids)} tokens" in error["message"]
        assert "at most 16" in error["message"]
        assert service.chat(LONG, truncate_prompt_tokens=17).error["param"] == "truncate_prompt_tokens"
        assert service.chat(LONG, truncate_prompt_tokens=16).status == 400
        endless = [{"role": "user", "content": "word " * 100_000}]
        assert service.chat(endless).status == 400
        assert service.render(endless, truncate_prompt_tokens=8)["token_ids"] == reference.ids(endless)[:8]
        assert (
            service.render(endless, truncate_prompt_tokens=8, truncation_side="left")["token_ids"]
            == (reference.ids(endless)[-8:])
        )


def test_media_are_cut_with_their_ranges_or_not_at_all(service, reference):
    chat = [{"role": "user", "content": [text("one two three four five"), PICTURE, text("six seven eight")]}]
    sent = user(text("one two three four five"), photo("cat.png"), text("six seven eight"))
    ids = reference.ids(chat, "cat.png")
    whole = service.render(sent)["features"]["mm_placeholders"]["image"][0]
    first, last = whole["offset"], whole["offset"] + whole["length"]
    left = service.render(sent, truncate_prompt_tokens=len(ids) - first, truncation_side="left")
    assert left["token_ids"] == ids[first:]
    assert left["features"]["mm_placeholders"]["image"] == [{"offset": 0, "length": whole["length"]}]
    right = service.render(sent, truncate_prompt_tokens=last)
    assert right["token_ids"] == ids[:last]
    assert right["features"]["mm_placeholders"]["image"] == [whole]
    assert right["features"]["kwargs_data"] == service.render(sent)["features"]["kwargs_data"]
    for fields in (
        {"truncate_prompt_tokens": last - 1},
        {"truncate_prompt_tokens": len(ids) - first - 1, "truncation_side": "left"},
        {"truncate_prompt_tokens": 3},
    ):
        for answer in (service.chat(sent, **fields), service.post("/tokenize", {"messages": sent, **fields})):
            assert answer.status == 400
            assert answer.error["param"] == "truncate_prompt_tokens"


def test_offsets_point_into_the_prompts_text(service, reference):
    answer = service.render(LONG, return_token_offsets=True, return_prompt_text=True)
    prompt = reference.text(LONG)
    expected = reference.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    assert answer["prompt_text"] == prompt
    assert answer["token_offsets"] == [list(pair) for pair in expected.offset_mapping]
    assert len(answer["token_offsets"]) == len(answer["token_ids"])
    cut = service.render(LONG, return_token_offsets=True, truncate_prompt_tokens=5, truncation_side="left")
    assert cut["token_offsets"] == answer["token_offsets"][-5:]
    assert service.render(LONG)["token_offsets"] is None
    assert service.render(user(photo("cat.png"), text("?")), return_token_offsets=True)["token_offsets"] is None
    texts = service.post("/v1/completions/render", {"prompt": ["Größe", "x"], "return_token_offsets": True}).json
    for one, words in zip(texts, ("Größe", "x"), strict=True):
        offsets = reference.tokenizer(words, return_offsets_mapping=True).offset_mapping
        assert one["token_offsets"] == [list(pair) for pair in offsets]
    (ids,) = service.post("/v1/completions/render", {"prompt": [1, 2], "return_token_offsets": True}).json
    assert ids["token_offsets"] is None


def test_a_models_own_sampling_holds_where_a_request_says_nothing(tmp_path):
    directory = write_qwen2_vl(tmp_path / "qwen")
    defaults = {"temperature": 0.01, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.05, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    del defaults["do_sample"]
    with serving("--cache-size", "64MiB", "--frontends", "1", model=directory) as service:
        params = service.render(LONG)["sampling_params"]
        del params["max_tokens"]
        assert params == defaults
        assert service.render(LONG, temperature=0.7)["sampling_params"]["temperature"] == 0.7


# --- templates of requests --------------------------------------------------------------------------------------------

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_of_a_request_is_refused_unless_it_is_trusted(service):
    for path, body in (("/v1/chat/completions/render", {"messages": LONG}), ("/tokenize", {"messages": LONG})):
        for fields in ({"chat_template": "x"}, {"chat_template": "default"}):
            error = service.post(path, {**body, **fields}).error
            assert (error["code"], error["param"]) == (400, "chat_template")
    error = service.chat(LONG, chat_template_kwargs={"chat_template": "x"}).error
    assert error["param"] == "chat_template_kwargs.chat_template"


def test_a_trusted_template_is_rendered_and_an_endless_one_holds_up_nobody(reference):
    own = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text or '<|image_pad|>' }}{% endfor %}{% endfor %}"
    with serving("--cache-size", "64MiB", "--frontends", "1", "--trust-request-chat-template") as service:
        sent = user(text("see "), photo("cat.png"))
        answer = service.render(sent, chat_template=own)
        chat = [{"role": "user", "content": [text("see "), PICTURE]}]
        assert answer["token_ids"] == reference.ids(chat, "cat.png", chat_template=own)
        counted = service.post("/tokenize", {"messages": sent, "chat_template": own}).json
        assert counted["tokens"] == answer["token_ids"]
        assert service.render(LONG, chat_template="default")["token_ids"] == reference.ids(LONG)
        assert "line 1" in service.chat(LONG, chat_template="{% if %}").error["message"]

        stopped = []
        asking = threading.Thread(target=lambda: stopped.append(service.chat(LONG, chat_template=ENDLESS)))
        asking.start()
        while not stopped:
            assert service.get("/health").status == 200
        asking.join()
        assert stopped[0].status == 400
        assert "was stopped" in stopped[0].error["message"]
        assert service.render(LONG)["token_ids"] == reference.ids(LONG)
