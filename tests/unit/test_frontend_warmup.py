"""A frontend's warm-up goes the way of requests and leaves nothing."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from tiny_tokenizer import build, card

from mmprep.digest import Hasher
from mmprep.errors import InvalidRequest
from mmprep_frontend import warmup
from mmprep_frontend.media.allowance import MediaLimits
from mmprep_frontend.media.intake import Intake
from mmprep_frontend.model import load_model
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer

LIMITS = MediaLimits(1 << 20, 1 << 20, 1 << 20, 1 << 20)
HASHER = Hasher("blake3")
#: Shows pictures and videos.
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.content is string %}{{- message.content }}{% else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}{{- part.text }}
            {%- elif part.type == 'image' %}{{- '<|image_pad|>' }}{% else %}{{- '<|video_pad|>' }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = build(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)
    loaded = load_tokenizer(directory)
    made = card(directory)
    dtypes = {placeholder.modality: ("uint8",) for placeholder in made.placeholders}
    made = msgspec.structs.replace(made, dtypes=dtypes)
    return load_model(directory, made, loaded, name="tiny", max_model_len=None, template=None)


@pytest.fixture
def warm(model, monkeypatch):
    """Warm up with these limits, and return the modalities and tools of what was rendered."""
    tried = []
    render = warmup._render

    def noting(model, intake, hasher, limits, request):
        chat = render(model, intake, hasher, limits, request)
        tried.append(([item.part.modality for item in chat.items], bool(request.tools), request.payload))
        return chat

    def run(limits):
        monkeypatch.setattr(warmup, "_render", noting)
        with ThreadPoolExecutor(2) as threads:
            intake = Intake(None, HASHER, LIMITS, threads, lambda _: None)
            warmup.warm_up(model, intake, HASHER, limits, [threads, threads])
        return tried

    return run


def test_texts_tools_and_every_modality_with_a_limit_are_rendered_with_tensors_and_without(model, warm):
    modalities = [placeholder.modality for placeholder in model.card.placeholders]
    tried = warm(dict.fromkeys(modalities, 1))
    assert ([], False, "tensors") in tried
    assert ([], True, "tensors") in tried
    assert {(modality, payload) for found, _, payload in tried for modality in found} == {
        (modality, payload) for modality in modalities for payload in ("tensors", "none")
    }
    assert len(model.prompts._prompts) == len(model.stages) == 0


def test_media_are_no_larger_than_a_request_may_have(model):
    most = 1 << 10
    with ThreadPoolExecutor(2) as threads:
        for limits in (MediaLimits(most, 1 << 20, 1 << 20, 1 << 20), MediaLimits(1 << 20, most, 1 << 20, 1 << 20)):
            intake = Intake(None, HASHER, limits, threads, lambda _: None)
            warmup.warm_up(model, intake, HASHER, {"image": 1}, [threads])


def test_a_modality_without_a_limit_is_left_out(warm):
    assert {modality for found, _, _ in warm({"image": 1, "video": 0}) for modality in found} == {"image"}


def test_a_template_may_refuse_what_is_tried(warm, monkeypatch):
    def refuse(*_):
        raise InvalidRequest("no tools")

    monkeypatch.setattr(warmup, "_item", refuse)
    assert {bool(found) for found, _, _ in warm({"image": 1})} == {False}
