"""The served model as a frontend knows it."""

import json

import pytest
from tiny_tokenizer import build, card

from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.model import load_model
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer
from mmprep_frontend.render.requests import parse

PICTURE = {"type": "image_url", "image_url": "data:image/png;base64,AA=="}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = build(tmp_path_factory.mktemp("model"))
    loaded = load_tokenizer(directory)
    return load_model(directory, card(directory), loaded, name="tiny", max_model_len=None, template=None)


@pytest.mark.parametrize(("given", "option"), [(None, "MODEL"), ("\n{% if %}", "--chat-template")])
def test_a_template_that_cannot_be_compiled_is_an_error_that_names_where_it_is_from(tmp_path, given, option):
    directory = build(tmp_path)
    (directory / "chat_template.jinja").write_text("\n{{ broken")
    with pytest.raises(StartupError, match=rf"{option}: the chat template cannot be compiled: line 2: \w+"):
        load_model(
            directory, card(directory), load_tokenizer(directory), name="tiny", max_model_len=None, template=given
        )


def pictures(count):
    return parse(json.dumps({"messages": [{"role": "user", "content": [PICTURE] * count}]}).encode(), "chat")


def test_a_request_has_at_most_its_limit_of_media_and_none_of_a_modality_without_a_limit(model):
    assert len(model.walk(pictures(3), {"image": 3}).media) == 3
    for limits in ({"image": 2}, {"image": 0, "video": 5}, {"video": 5}, {}):
        with pytest.raises(InvalidRequest, match="image") as refused:
            model.walk(pictures(3), limits)
        assert refused.value.param == f"messages[0].content[{limits.get('image', 0)}].image_url"


def test_a_request_never_has_more_media_than_one_offer_takes(model):
    assert len(model.walk(pictures(256), {"image": 1000}).media) == 256
    with pytest.raises(InvalidRequest, match="257 media; at most 256") as refused:
        model.walk(pictures(257), {"image": 1000})
    assert refused.value.param == "messages[0].content[256].image_url"


def test_a_prompt_that_may_differ_next_time_or_tells_offsets_has_no_key(model):
    def key(**fields):
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        request = parse(json.dumps(body).encode(), "chat", templates=True)
        return model.prompt_key(model.walk(request, {}), request, 100, bytes(32))

    assert key() is not None
    assert key(chat_template="{{ messages[0].content }}") is not None
    assert key(chat_template="{{ strftime_now('%c') }}") is None
    assert key(return_token_offsets=True) is None
