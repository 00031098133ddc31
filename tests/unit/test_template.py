import json

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, IMAGE, STRING_TEMPLATE, build, card

from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.conversation import walk
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.sentinels import Sentinels
from mmprep_frontend.render.template import ChatTemplate, load_sources

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return card(build(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sentinels(model):
    return Sentinels(model)


def rendered(source, sentinels, model, messages=None, **fields):
    """Render; placeholders of the template are shown as «image»."""
    messages = [{"role": "user", "content": "hello"}] if messages is None else messages
    request = parse(json.dumps({"messages": messages, **fields}).encode(), "chat", templates=True)
    sources = source if isinstance(source, dict) else {"default": source}
    template = ChatTemplate(sources, {"eos_token": "<|im_end|>", "image_token": IMAGE}, sentinels)
    conversation = walk(request.messages, model, template.format_for(request), sentinels)
    return template.render(conversation, request).replace(sentinels.hide(IMAGE), "«image»")


def refusal(*args, **kwargs):
    with pytest.raises(InvalidRequest) as caught:
        rendered(*args, **kwargs)
    return caught.value


def test_placeholders_of_the_template_are_told_from_typed_ones(sentinels, model):
    messages = [{"role": "user", "content": [{"type": "text", "text": f"see {IMAGE}:"}, PICTURE]}]
    text = rendered(CHAT_TEMPLATE, sentinels, model, messages)
    assert f"see {IMAGE}:<|vision_start|>«image»<|vision_end|>" in text


def test_placeholders_in_special_token_variables_are_real(sentinels, model):
    assert rendered("{{ image_token }}{{ eos_token }}", sentinels, model) == "«image»<|im_end|>"


def test_placeholders_in_the_text_of_a_string_template_are_real(sentinels, model):
    messages = [{"role": "user", "content": [PICTURE, {"type": "text", "text": IMAGE}]}]
    assert rendered(STRING_TEMPLATE, sentinels, model, messages) == (
        f"user: <|vision_start|>«image»<|vision_end|>\n{IMAGE}<|im_end|>\n"
    )


@pytest.mark.parametrize("field", ["content", "tools", "chat_template_kwargs", "documents"])
def test_a_sentinel_in_a_request_is_refused(field, sentinels, model):
    stolen = sentinels.hide(IMAGE)
    fields = {"tools": [{"a": stolen}], "chat_template_kwargs": {"a": stolen}, "documents": [{"a": stolen}]}
    messages = [{"role": "user", "content": stolen if field == "content" else "x"}]
    error = refusal(CHAT_TEMPLATE, sentinels, model, messages, **({} if field == "content" else {field: fields[field]}))
    assert stolen not in error.message


def test_deep_nesting_is_refused_and_breaks_nothing(sentinels, model):
    template = ChatTemplate({"default": "{{ tools | tojson | length }}"}, {}, sentinels)
    outcomes = set()
    for depth in (10, 300, 600, *range(850, 1000, 3)):
        body = (
            b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "parameters": %s1%s}}]}'
            % (
                b'{"a":' * depth,
                b"}" * depth,
            )
        )
        try:
            request = parse(body, "chat")
            template.render(walk(request.messages, model, "string", sentinels), request)
            outcomes.add("rendered")
        except InvalidRequest:
            outcomes.add("refused")
    assert outcomes == {"rendered", "refused"}


def test_sentinels_differ_from_process_to_process(model):
    assert Sentinels(model).hide(IMAGE) != Sentinels(model).hide(IMAGE)


def test_the_environment_has_what_templates_use(sentinels, model):
    source = (
        "{%- for n in [1, 2, 3] %}\n    {%- if n == 2 %}{% continue %}{% endif %}{{ n }}\n{%- endfor %}|"
        "{{ {'a': '<é>'} | tojson }}|{% generation %}{{ messages[0].content }}{% endgeneration %}|"
        "{{ strftime_now('%%') }}"
    )
    assert rendered(source, sentinels, model) == '13|{"a": "<é>"}|hello|%'


def test_the_template_cannot_reach_into_the_process(sentinels, model):
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.format.__globals__ }}"):
        error = refusal(source + "{{ nothing.at.all }}", sentinels, model)
        assert "__" not in error.message


def test_what_the_template_says_of_its_refusal_is_passed_on(sentinels, model):
    error = refusal(CHAT_TEMPLATE, sentinels, model, [{"role": "developer", "content": "x"}])
    assert error.message.endswith("no developers, and no <|image_pad|>")


def test_a_failing_template_tells_nothing_of_itself(sentinels, model):
    for source in ("{{ messages[7].secret.more }}", "{{ 1 / 0 }}", "{{ raise_exception }}{{ 'a' + 1 }}"):
        error = refusal(source, sentinels, model)
        assert "cannot render this conversation" in error.message
        assert "secret" not in error.message


def test_a_model_without_a_template_points_to_completions(sentinels, model):
    assert "/v1/completions/render" in refusal({}, sentinels, model).message


def test_requests_with_tools_get_the_template_for_tools(sentinels, model):
    sources = {"default": "plain", "tool_use": "tools"}
    assert rendered(sources, sentinels, model) == "plain"
    assert rendered(sources, sentinels, model, tools=[{"type": "function", "function": {"name": "f"}}]) == "tools"


def test_template_variables_come_from_the_request(sentinels, model):
    source = "{{ enable_thinking }} {{ reasoning_effort }} {{ documents }} {{ add_generation_prompt }} {{ self_name }}"
    text = rendered(
        source,
        sentinels,
        model,
        reasoning_effort="none",
        documents=[{"title": "t"}],
        add_generation_prompt=False,
        chat_template_kwargs={"self_name": "x", "self": 1},
    )
    assert text == "False none [{'title': 't'}] False x"
    assert refusal(source, sentinels, model, chat_template_kwargs={"messages": []}).param == (
        "chat_template_kwargs.messages"
    )


def test_a_final_message_can_be_continued(sentinels, model):
    def continued(source, content):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
        return rendered(
            source, sentinels, model, messages, continue_final_message=True, add_generation_prompt=False
        ).rpartition("assistant")[2]

    assert continued(CHAT_TEMPLATE, "and so ") == "\nand so "
    assert continued(CHAT_TEMPLATE, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "\nab"
    assert continued(STRING_TEMPLATE, "and so ") == ": and so"
    with pytest.raises(InvalidRequest, match="no text to continue"):
        continued(CHAT_TEMPLATE, [PICTURE])
    with pytest.raises(InvalidRequest, match="leaves the final message out"):
        continued("{{ messages[0].content }}", "x")


def test_a_template_that_cannot_be_compiled_stops_the_start(sentinels):
    with pytest.raises(StartupError, match="line 2"):
        ChatTemplate({"default": "\n{% if %}"}, {}, sentinels)


def test_templates_are_found_where_models_keep_them(tmp_path):
    assert load_sources(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert load_sources(tmp_path) == {"default": "one"}
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_sources(tmp_path) == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert load_sources(tmp_path) == {"default": "processor"}
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert load_sources(tmp_path) == {"default": "file", "tool_use": "more"}


@pytest.mark.parametrize("broken", ["{", "[]", '{"chat_template": 3}', '{"chat_template": [{"name": "x"}]}'])
def test_a_broken_template_file_stops_the_start(broken, tmp_path):
    (tmp_path / "chat_template.json").write_text(broken)
    with pytest.raises(StartupError):
        load_sources(tmp_path)


def test_a_request_may_bring_its_own_template_whose_placeholders_are_real(sentinels, model):
    messages = [{"role": "user", "content": [PICTURE, {"type": "text", "text": IMAGE}]}]
    own = "{% for part in messages[0].content %}{{ part.text or '<|image_pad|>' }}{% endfor %}"
    assert rendered(CHAT_TEMPLATE, sentinels, model, messages, chat_template=own) == f"«image»{IMAGE}"
    assert rendered(CHAT_TEMPLATE, sentinels, model, chat_template="{{ messages[0].content }}!") == "hello!"


def test_a_request_may_name_one_of_the_models_templates(sentinels, model):
    sources = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    assert rendered(sources, sentinels, model, chat_template="rag") == "documents"
    assert (
        rendered(
            sources, sentinels, model, chat_template="default", tools=[{"type": "function", "function": {"name": "f"}}]
        )
        == "plain"
    )
    assert rendered(sources, sentinels, model, chat_template="neither") == "neither"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("{% if %}", "line 1"),
        ("\n{{ x", "line 2"),
        ("x" * 70_000, "70000 characters; at most 65536"),
        ("{% for a in b %}" * 60 + "{% endfor %}" * 60, "cannot be compiled"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be compiled"),
    ],
)
def test_a_template_of_a_request_that_cannot_be_compiled_is_refused_by_name(own, words, sentinels, model):
    error = refusal(CHAT_TEMPLATE, sentinels, model, chat_template=own)
    assert error.param == "chat_template"
    assert words in error.message


def test_templates_of_requests_are_kept_and_not_without_end(sentinels, model):
    template = ChatTemplate({"default": "plain"}, {}, sentinels)

    def asks_for(source):
        body = {"messages": [{"role": "user", "content": "x"}], "chat_template": source}
        return parse(json.dumps(body).encode(), "chat", templates=True)

    first = asks_for("first")
    assert not template.is_ready(first)
    template.prepare(first)
    assert template.is_ready(first)
    for number in range(40):
        template.prepare(asks_for(f"number {number}"))
    assert not template.is_ready(first)
    assert template.is_ready(asks_for("number 39"))
    assert template.render(walk(first.messages, model, template.format_for(first), sentinels), first) == "first"


def test_an_endless_template_is_stopped_and_the_refusal_says_so(sentinels, model):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "was stopped" in refusal(endless, sentinels, model).message
    assert "was stopped" in refusal(CHAT_TEMPLATE, sentinels, model, chat_template=endless).message


ROLES = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def developer(content):
    return {"role": "developer", "content": content}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([developer("a"), {"role": "user", "content": "q"}], "system=a;user=q;"),
        (
            [{"role": "system", "content": "a"}, {"role": "user", "content": "q"}, developer("b")],
            "system=a\n\nb;user=q;",
        ),
        (
            [developer(""), {"role": "user", "content": "q"}, developer([{"type": "text", "text": "b"}])],
            "system=b;user=q;",
        ),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "a"}], "user=q;system=a;"),
    ],
)
def test_a_template_that_knows_no_developers_gets_their_words_from_the_system(messages, expected, sentinels, model):
    assert rendered(ROLES, sentinels, model, messages) == expected


def test_a_template_that_knows_developers_gets_them(sentinels, model):
    source = ROLES + "{{ 'developer' if false }}"
    assert rendered(source, sentinels, model, [developer("a")]) == "developer=a;"


def test_an_effort_turns_thinking_on_or_off_unless_the_request_says_it_itself(sentinels, model):
    source = "{{ enable_thinking }} {{ reasoning_effort }}"
    assert rendered(source, sentinels, model, reasoning_effort="high") == "True high"
    assert rendered(source, sentinels, model, reasoning_effort="none") == "False none"
    kwargs = {"enable_thinking": False, "reasoning_effort": "max"}
    assert rendered(source, sentinels, model, reasoning_effort="low", chat_template_kwargs=kwargs) == "False low"
