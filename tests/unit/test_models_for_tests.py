import json
import logging
import socket

import numpy as np
import pytest
from PIL import Image
from tests.models import write_llava15, write_qwen2_audio, write_qwen2_vl
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from mmprep import embedded

WRITERS = {
    "embedded": lambda _path: embedded.path(),
    "qwen2_vl": write_qwen2_vl,
    "qwen2_5_vl": lambda path: write_qwen2_vl(path, qwen25=True),
    "llava": write_llava15,
}


@pytest.fixture(scope="module", params=list(WRITERS))
def directory(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava15(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"something dialled {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def warnings_logged(caplog):
    """What transformers logs as a warning; its loggers do not hand on to the root."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog.records
    logger.removeHandler(caplog.handler)


@pytest.mark.usefixtures("no_network")
def test_transformers_loads_the_directory_offline_and_without_a_warning(directory, warnings_logged):
    config = AutoConfig.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)
    assert config.model_type == json.loads((directory / "config.json").read_text())["model_type"]
    assert tokenizer.is_fast
    assert type(processor).__name__.endswith("Pil")
    assert [record.getMessage() for record in warnings_logged if record.levelno >= logging.WARNING] == []


def test_the_image_token_of_the_configuration_is_the_one_of_the_template(directory):
    config = AutoConfig.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)).input_ids
    assert ids.count(config.image_token_id) == 1


def test_qwen_limits_are_written_as_published_and_can_be_replaced(tmp_path):
    published = AutoImageProcessor.from_pretrained(write_qwen2_vl(tmp_path / "a"))
    assert dict(published.size) == {"shortest_edge": 3136, "longest_edge": 12845056}
    size = {"shortest_edge": 784, "longest_edge": 78400}
    other = AutoImageProcessor.from_pretrained(write_qwen2_vl(tmp_path / "b", size=size, image_mean=[0.5, 0.5, 0.5]))
    assert dict(other.size) == size
    assert list(other.image_mean) == [0.5, 0.5, 0.5]


def test_qwen_configuration_values_can_be_replaced(tmp_path):
    path = write_qwen2_vl(tmp_path, qwen25=True, config={"max_position_embeddings": 64})
    config = AutoConfig.from_pretrained(path)
    assert (config.model_type, config.text_config.max_position_embeddings) == ("qwen2_5_vl", 64)


def test_llava_writes_the_pictures_of_a_turn_before_its_text(llava):
    tokenizer = AutoTokenizer.from_pretrained(llava)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "Be brief. USER: <image>\nWhat is this? ASSISTANT: A cat. USER: Why? ASSISTANT:"
    )


def test_llava_processor_turns_a_picture_into_576_positions_of_336_pixels(llava):
    processor = AutoProcessor.from_pretrained(llava)
    picture = Image.fromarray(np.arange(50 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(50, 80, 3))
    out = processor(text="USER: <image>\nHi ASSISTANT:", images=[picture], return_tensors="np")
    assert out["pixel_values"].shape == (1, 3, 336, 336)
    config = AutoConfig.from_pretrained(llava)
    assert (out["input_ids"] == config.image_token_index).sum() == 576


@pytest.mark.parametrize("text", ["", "Hello  world\n\n <image> you", "你好 🚀 x", "</s> naïve <pad>"])
def test_llava_bare_tokenizer_file_gives_the_ids_of_transformers(llava, text):
    bare = Tokenizer.from_file(str(llava / "tokenizer.json"))
    ids = AutoTokenizer.from_pretrained(llava)(text).input_ids
    assert bare.encode(text).ids == ids
    assert ids[0] == 1
    assert bare.decode(ids[1:], skip_special_tokens=False).replace(" ", "") == text.replace(" ", "")


@pytest.mark.usefixtures("no_network")
def test_transformers_loads_qwen2_audio_offline_and_without_a_warning(tmp_path, warnings_logged):
    path = write_qwen2_audio(tmp_path)
    config = AutoConfig.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    assert (config.model_type, type(processor).__name__) == ("qwen2_audio", "Qwen2AudioProcessor")
    assert processor.audio_token_id == config.audio_token_id == 6147
    assert (processor.feature_extractor.sampling_rate, processor.feature_extractor.nb_max_frames) == (16000, 3000)
    assert [record.getMessage() for record in warnings_logged if record.levelno >= logging.WARNING] == []


def test_qwen2_audio_numbers_the_recordings_of_a_conversation(tmp_path):
    processor = AutoProcessor.from_pretrained(write_qwen2_audio(tmp_path))
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": ""}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A bell."},
        {"role": "user", "content": [{"type": "text", "text": "And this? "}, {"type": "audio", "audio": ""}]},
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA bell.<|im_end|>\n"
        "<|im_start|>user\nAnd this? Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
