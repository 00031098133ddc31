"""Data URLs are taken out of a request's JSON before it is parsed, and nobody can tell from what comes of it."""

import base64
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_tokenizer import IMAGE

from mmprep.card import ModelCard, Placeholder
from mmprep.errors import InvalidRequest
from mmprep_frontend.render.conversation import walk
from mmprep_frontend.render.data_urls import take_out
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.sentinels import Sentinels

CARD = ModelCard("any", b"", (Placeholder("image", IMAGE, 7, IMAGE),), {}, {})
SENTINELS = Sentinels(CARD)
#: Above what is worth taking out.
LARGE = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 20).decode()

urls = st.one_of(
    st.sampled_from((LARGE, LARGE.rstrip("="), "data:image/png;base64,QUJD", "https://a.example/x", "", "data:")),
    st.text(st.sampled_from('Aé"\\,: \n'), max_size=5).map(LARGE.__add__),
)
texts = st.one_of(urls, st.text(st.sampled_from('":\\ d,{[é'), max_size=6).map(lambda text: text + '"data:' + LARGE))
parts = st.one_of(
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, urls),
    st.builds(lambda url: {"type": "input_image", "image_url": url}, urls),
    st.builds(lambda text: {"type": "text", "text": text}, texts),
)
messages = st.lists(
    st.builds(lambda content: {"role": "user", "content": content}, st.one_of(texts, st.lists(parts, max_size=4))),
    min_size=1,
    max_size=3,
)
requests = st.builds(
    lambda messages, extra: {"messages": messages, **extra},
    messages,
    st.sampled_from(({}, {"chat_template_kwargs": {"url": LARGE}}, {"documents": [{"url": LARGE}]})),
)
#: How clients write JSON.
writings = st.fixed_dictionaries(
    {
        "separators": st.sampled_from(((",", ":"), (", ", ": "), (" , ", " : "))),
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from((None, 2)),
    }
)


def outcome(request, media):
    """What comes of a request: the URLs of its media, and all else of it."""
    conversation = walk(request.messages, CARD, "both", SENTINELS)
    found = [(part.param, bytes(part.url) if isinstance(part.url, memoryview) else part.url.encode()) for part in media]
    return found, conversation.messages, request.chat_template_kwargs, request.documents


def whole(body):
    request = parse(body, "chat")
    return outcome(request, walk(request.messages, CARD, "both", SENTINELS).media)


def in_parts(body):
    taken = take_out(body)
    request = parse(taken.json, "chat")
    if not taken.are_media_of(request.messages):
        return None
    return outcome(request, taken.put_back(walk(request.messages, CARD, "both", SENTINELS).media))


@given(requests, writings)
@example({"messages": [{"role": "user", "content": LARGE}]}, {})
@example({"messages": [{"role": "user", "content": [{"type": "text", "text": f'\\"data:{LARGE}'}]}]}, {})
def test_a_request_is_what_it_is_or_to_be_parsed_whole(request, writing):
    body = json.dumps(request, **writing).encode()
    assert told(in_parts, body) in (None, told(whole, body))


def told(read, body):
    """What ``read`` makes of a request, or what it says is wrong and where; ``None`` where it is to be parsed whole."""
    try:
        return read(body)
    except InvalidRequest as error:
        return error.message, error.param


def chat(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


PICTURE = {"type": "image_url", "image_url": {"url": LARGE}}


def test_urls_of_media_are_views_of_the_request():
    body = json.dumps(chat(PICTURE, {"type": "input_image", "image_url": LARGE})).encode()
    taken = take_out(body)
    assert [(view.obj is body, bytes(view)) for view in taken.urls.values()] == [(True, LARGE.encode())] * 2
    assert len(taken.json) < 1000
    assert in_parts(body) == whole(body)


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [{"role": "user", "content": LARGE}]},
        chat({"type": "text", "text": LARGE}, PICTURE),
        chat(PICTURE) | {"documents": [{"url": LARGE}]},
        chat({"type": "image_url", "image_url": {"url": "https://a.example/x"}})
        | {"chat_template_kwargs": {"a": LARGE}},
    ],
)
def test_what_is_no_mediums_url_is_not_taken_for_one(request_):
    taken = take_out(json.dumps(request_).encode())
    assert taken.urls
    assert not taken.are_media_of(parse(taken.json, "chat").messages)


def test_a_url_that_counts_no_more_is_not_taken_for_one_that_does():
    body = json.dumps(chat(PICTURE)).replace('"url"', f'"url": "{LARGE}", "url"').encode()
    taken = take_out(body)
    assert len(taken.urls) == 2
    assert not taken.are_media_of(parse(taken.json, "chat").messages)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(chat(PICTURE)).replace("/", "\\/").encode(),
        json.dumps(chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}})).encode(),
        memoryview(json.dumps(chat(PICTURE)).encode()),
        b'{"messages": "data:' + b"A" * 10_000,
        b'"data:' * 10_000,
        b"",
    ],
    ids=["spelled with backslashes", "small", "a view", "without an end", "nothing but beginnings", "empty"],
)
def test_nothing_is_taken_out_of(body):
    taken = take_out(body)
    assert taken.json is body
    assert not taken.urls


def test_words_of_one_request_are_nothing_in_another():
    (word,) = take_out(json.dumps(chat(PICTURE)).encode()).urls
    forged = json.dumps(chat({"type": "image_url", "image_url": {"url": word}})).encode()
    assert whole(forged)[0] == in_parts(forged)[0] == [("messages[0].content[0].image_url", word.encode())]
