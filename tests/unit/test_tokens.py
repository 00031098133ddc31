import json

import pytest
from tiny_tokenizer import IMAGE, STRING_TEMPLATE, build, card
from transformers import AutoTokenizer

from mmprep.card import ModelCard, Placeholder
from mmprep.errors import InvalidRequest, StartupError
from mmprep_frontend.render.conversation import walk
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer
from mmprep_frontend.render.requests import parse
from mmprep_frontend.render.sentinels import Sentinels
from mmprep_frontend.render.template import ChatTemplate, load_sources
from mmprep_frontend.render.tokens import Tokenizer

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"é": "<b>"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


class Renderer:
    """What the service does to a chat: the walk, the template, the tokens."""

    def __init__(self, directory):
        self.card = card(directory)
        self.sentinels = Sentinels(self.card)
        self.tokenizer = Tokenizer(load_tokenizer(directory), self.card, self.sentinels)
        self.template = ChatTemplate(load_sources(directory), self.tokenizer.special_tokens, self.sentinels)
        self.image_id = self.card.placeholder("image").token_id

    def chat(self, messages, **fields):
        request = parse(json.dumps({"messages": messages, **fields}).encode(), "chat")
        conversation = walk(request.messages, self.card, self.template.format_for(request), self.sentinels)
        return self.text(self.template.render(conversation, request), add_special_tokens=request.add_special_tokens)

    def text(self, text, *, add_special_tokens=False):
        return self.tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(directory):
    return Renderer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


CHATS = {
    "text": [{"role": "user", "content": "What is in this image?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe … “x”\n\n  y "}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "images": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "and"}, PICTURE]}],
    "special tokens in the text": [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\nx<|vision_start|>"}],
    "turns": [
        {"role": role, "content": f"turn {turn}: two cats on a sofa {turn * 7}"}
        for turn in range(20)
        for role in ("user", "assistant")
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 3}', "tool_call_id": "1"},
        {"role": "user", "content": [PICTURE]},
    ],
}


def as_reference_takes_it(messages):
    """Return `messages` with objects for the JSON texts, which is what transformers wants of its callers."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}, {"tools": TOOLS}])
def test_tokens_equal_those_of_transformers(name, fields, renderer, reference):
    expected = reference.apply_chat_template(
        as_reference_takes_it(CHATS[name]), tokenize=True, **{"add_generation_prompt": True, **fields}
    )["input_ids"]
    prompt = renderer.chat(CHATS[name], **fields)
    assert prompt.token_ids == expected
    images = [index for index, token_id in enumerate(expected) if token_id == renderer.image_id]
    assert [(placed.modality, placed.position) for placed in prompt.placeholders] == [("image", i) for i in images]


def test_a_continued_message_has_the_tokens_of_transformers(renderer, reference):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "two cats "}]
    expected = reference.apply_chat_template(messages, tokenize=True, continue_final_message=True)["input_ids"]
    prompt = renderer.chat(messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt.token_ids == expected


@pytest.mark.parametrize(
    "parts",
    [
        [IMAGE, PICTURE],
        [PICTURE, IMAGE],
        [f"a{IMAGE}b{IMAGE}{IMAGE}", PICTURE, f"<{IMAGE}>", PICTURE],
        ["<|image", "_pad|>", PICTURE],
        ["<", "|image_pad|>", PICTURE, "<|ima", "ge_p", "ad|>"],
        [f"<|vision_start|>{IMAGE}<|vision_end|>", PICTURE],
        [f"<|image_pad{IMAGE}", PICTURE, "_pad|>"],
        ["<|video_pad|>", PICTURE, f"<|video_pad{IMAGE}|>"],
        [IMAGE],
    ],
)
def test_typed_placeholders_stay_text(parts, renderer):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    prompt = renderer.chat([{"role": "user", "content": content}])
    pictures = parts.count(PICTURE)
    assert len(prompt.placeholders) == prompt.token_ids.count(renderer.image_id) == pictures
    shown = "".join(f"<|vision_start|>{IMAGE}<|vision_end|>" if part is PICTURE else part for part in parts)
    assert renderer.tokenizer.decode(prompt.token_ids) == prompt.text
    assert f"user\n{shown}<|im_end|>" in prompt.text
    start = renderer.tokenizer.decode(prompt.token_ids[: prompt.placeholders[0].position]) if pictures else ""
    assert start == prompt.text[: len(start)]


@pytest.mark.parametrize("typed", [IMAGE, "<|video_pad|>"])
def test_typed_placeholders_of_a_plain_text_are_text(typed, renderer):
    prompt = renderer.text(f"look: {typed}!")
    assert prompt.placeholders == []
    assert renderer.tokenizer.decode(prompt.token_ids) == f"look: {typed}!"


def test_typed_placeholders_in_a_string_template_stay_text(tmp_path):
    renderer = Renderer(build(tmp_path, chat_template=STRING_TEMPLATE))
    content = [{"type": "text", "text": f"x {IMAGE}"}, PICTURE, {"type": "text", "text": IMAGE}]
    prompt = renderer.chat([{"role": "user", "content": content}])
    before = f"user: x {IMAGE}\n<|vision_start|>"
    (placed,) = prompt.placeholders
    assert renderer.tokenizer.decode(prompt.token_ids[: placed.position]) == before


def test_special_tokens_go_around_a_text_also_where_it_was_cut(tmp_path):
    renderer = Renderer(build(tmp_path, surrounded=True))
    reference = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert renderer.text("two cats", add_special_tokens=True).token_ids == reference("two cats")["input_ids"]
    assert renderer.text("two cats").token_ids == reference("two cats", add_special_tokens=False)["input_ids"]
    prompt = renderer.text(f"x {IMAGE}", add_special_tokens=True)
    assert renderer.tokenizer.decode(prompt.token_ids) == f"<|im_start|>x {IMAGE}<|endoftext|>"


def test_nothing_is_cut_or_filled_up(renderer):
    assert len(renderer.text("cats " * 5000).token_ids) >= 5000
    assert len(renderer.text("a").token_ids) == 1


def test_an_empty_prompt_is_refused(renderer):
    with pytest.raises(InvalidRequest, match="empty"):
        renderer.text("")


def test_a_placeholder_made_by_the_tokenizer_itself_is_refused(directory, tmp_path):
    """A normalizer may turn other characters into a placeholder's text; the picture's range must not move."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    for token in tokenizer["added_tokens"]:
        token["normalized"] = True
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((directory / name).read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    renderer = Renderer(tmp_path)
    content = [{"type": "text", "text": IMAGE.upper()}, PICTURE]
    with pytest.raises(InvalidRequest, match="takes for a placeholder"):
        renderer.chat([{"role": "user", "content": content}])


def test_ids_are_checked_decoded_and_spelled(renderer):
    tokenizer = renderer.tokenizer
    ids = renderer.text("two cats<|im_end|>").token_ids
    tokenizer.check_ids(ids, "tokens")
    assert tokenizer.decode(ids) == "two cats<|im_end|>"
    strings = tokenizer.token_strs(ids)
    assert strings[-1] == "<|im_end|>"
    assert "".join(strings) == "twoĠcats<|im_end|>"
    tokenizer.check_ids([tokenizer.vocab_size - 1, 0], "tokens")


@pytest.mark.parametrize(("wrong", "param"), [(-1, "tokens[1]"), (2**70, "tokens[1]"), (None, "tokens")])
def test_ids_outside_the_vocabulary_are_refused_by_place(wrong, param, renderer):
    ids = [] if wrong is None else [0, wrong]
    with pytest.raises(InvalidRequest) as caught:
        renderer.tokenizer.check_ids(ids, "tokens")
    assert caught.value.param == param


def test_the_first_id_behind_the_vocabulary_is_refused(renderer):
    with pytest.raises(InvalidRequest):
        renderer.tokenizer.check_ids([renderer.tokenizer.vocab_size], "prompt")


def test_a_directory_without_a_tokenizer_stops_the_start_without_naming_it(tmp_path):
    with pytest.raises(StartupError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_a_card_of_another_vocabulary_stops_the_start(directory):
    card_of_another = ModelCard("x", b"", (Placeholder("image", IMAGE, 3, IMAGE),), {}, {})
    with pytest.raises(StartupError, match="of id 3"):
        Tokenizer(load_tokenizer(directory), card_of_another, Sentinels(card_of_another))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["Größe und … “x”\n\n  y ", "a<|im_end|>b", "plain"])
def test_offsets_are_those_of_the_reference(text, special, tmp_path):
    directory = build(tmp_path, surrounded=True)
    renderer = Renderer(directory)
    reference = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    expected = reference(text, add_special_tokens=special, return_offsets_mapping=True, truncation=False)
    encoded = renderer.tokenizer.encode_text(text, add_special_tokens=special, offsets_from=0)
    assert (encoded.token_ids, encoded.offsets) == (expected.input_ids, expected.offset_mapping)
    assert renderer.text(text, add_special_tokens=special).offsets is None
    shifted = renderer.tokenizer.encode_text(text, add_special_tokens=False, offsets_from=5).offsets
    plain = renderer.tokenizer.encode_text(text, add_special_tokens=False, offsets_from=0).offsets
    assert shifted == [(start + 5, end + 5) for start, end in plain]


def test_offsets_point_into_the_text_also_where_a_placeholder_was_typed(renderer):
    encoded = renderer.tokenizer.encode_prompt(f"see {IMAGE} and {IMAGE}", add_special_tokens=False, offsets_from=0)
    assert len(encoded.offsets) == len(encoded.token_ids)
    assert "".join(encoded.text[start:end] for start, end in encoded.offsets) == f"see {IMAGE} and {IMAGE}"
