import importlib.util
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from mmprep import embedded

ROOT = Path(__file__).resolve().parents[2]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}

#: Unassigned code points have no fixed normal form: it depends on the version of Unicode.
any_text = st.text(st.characters(exclude_categories=("Cs", "Cn")))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def bare_tokenizer():
    return Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model_config():
    return json.loads((embedded.path() / "config.json").read_text())


@pytest.fixture
def render(tokenizer):
    def render_text(*messages, **options):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)

    return render_text


def test_the_directory_holds_a_model_without_weights_and_is_small():
    files = {file.name: file.stat().st_size for file in embedded.path().iterdir()}
    assert set(files) == {
        "config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) < 1_000_000


def test_training_again_gives_the_same_bytes(tmp_path):
    script = ROOT / "scripts" / "train_embedded_tokenizer.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (embedded.path() / name).read_bytes()


def test_the_words_are_split_as_qwen2_splits_them():
    document = json.loads((embedded.path() / "tokenizer.json").read_text(encoding="utf-8"))
    assert document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == PRETOKENIZE_REGEX


@settings(deadline=None)
@given(any_text)
def test_any_text_comes_back_in_its_composed_form(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(any_text)
def test_the_bare_tokenizer_file_gives_the_ids_of_transformers(tokenizer, bare_tokenizer, text):
    assert bare_tokenizer.encode(text).ids == tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("key", "token"),
    [
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("vision_token_id", "<|vision_pad|>"),
        ("bos_token_id", "<|endoftext|>"),
        ("eos_token_id", "<|im_end|>"),
    ],
)
def test_the_configuration_names_the_special_tokens_by_their_ids(tokenizer, model_config, key, token):
    assert tokenizer.encode(token) == [model_config[key]]


def test_every_token_is_below_the_vocabulary_size(tokenizer, model_config):
    assert max(tokenizer.get_vocab().values()) < model_config["vocab_size"]
    assert tokenizer.model_max_length == model_config["max_position_embeddings"] == 32768


def test_generation_ends_at_the_end_of_a_turn(tokenizer):
    generation = json.loads((embedded.path() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["pad_token_id"] == tokenizer.pad_token_id


def test_a_conversation_without_a_system_turn_gets_the_default_one(render):
    assert render({"role": "user", "content": "Hi"}, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_system_turn_of_the_caller_replaces_the_default_one(render):
    assert render({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("part", "token"),
    [
        ({"type": "image"}, "<|image_pad|>"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, "<|image_pad|>"),
        ({"type": "video"}, "<|video_pad|>"),
        ({"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}}, "<|video_pad|>"),
    ],
)
def test_a_medium_becomes_one_pad_token_between_the_vision_marks(render, part, token):
    text = render({"role": "user", "content": [{"type": "text", "text": "a"}, part, {"type": "text", "text": "b"}]})
    assert text.endswith(f"<|im_start|>user\na<|vision_start|>{token}<|vision_end|>b<|im_end|>\n")


def test_media_are_numbered_on_request(render):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "image"}]}
    text = render(turn, add_vision_id=True)
    assert text.count("Picture 1: ") == text.count("Picture 2: ") == text.count("Video 1: ") == 1


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_are_described_once_in_the_system_turn(render, system):
    text = render(*system, {"role": "user", "content": "Hi"}, tools=[TOOL])
    assert text.count("<|im_start|>system\n") == 1
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert json.loads(listed) == TOOL


@pytest.mark.parametrize("arguments", [{"word": "<b>"}, '{"word": "<b>"}'])
def test_calls_and_their_answers_keep_their_places(render, arguments):
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    text = render(
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    )
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "look_up", "arguments": {"word": "<b>"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    )


def test_the_processor_turns_a_photograph_into_patches_of_qwen2_vl():
    processor = AutoImageProcessor.from_pretrained(embedded.path())
    assert type(processor).__name__ == "Qwen2VLImageProcessorPil"
    with Image.open(embedded.photos()[-1]) as photo:
        assert photo.size == (640, 480)
        out = processor(images=[photo], return_tensors="np")
    assert out["image_grid_thw"].tolist() == [[1, 34, 46]]
    assert out["pixel_values"].shape == (34 * 46, 3 * 2 * 14 * 14)
    assert out["pixel_values"].dtype == np.float32


@pytest.mark.parametrize("folder", [ROOT / "tests" / "data", embedded.path().parent / "photos"], ids=["tests", "demo"])
def test_every_photograph_decodes_is_small_and_has_a_licence(folder):
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    photos = [file for file in folder.iterdir() if file.is_file() and file.name != "LICENSES.md"]
    assert len(photos) >= 2
    for photo in photos:
        assert photo.stat().st_size < 150_000
        with Image.open(photo) as image:
            image.load()
            assert min(image.size) >= 200
        row = next(line for line in licences.splitlines() if line.startswith(f"| `{photo.name}` |"))
        assert all(cell.strip() for cell in row.strip("|").split("|"))
        assert any(word in row for word in ("CC0", "public domain"))


def test_the_photographs_of_the_demonstration_are_found():
    assert [photo.name for photo in embedded.photos()] == ["cat.jpg", "rocket.jpg"]


def test_every_training_text_has_a_licence():
    data = ROOT / "scripts" / "data"
    notice = (data / "NOTICE.md").read_text(encoding="utf-8")
    for text in data.glob("*.txt"):
        assert f"| `{text.name}` |" in notice


def test_the_converter_of_ranks_finds_the_merges_that_made_them():
    converter = _script("make_qwen_size_model")
    model = json.loads((embedded.path() / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    letters = {letter: byte for byte, letter in converter.byte_letters().items()}
    ranks = {bytes(letters[letter] for letter in token): rank for token, rank in model["vocab"].items()}
    assert converter.convert(ranks) == (model["vocab"], model["merges"])


def test_the_converter_moves_the_special_tokens_behind_a_new_vocabulary(tmp_path):
    converter = _script("make_qwen_size_model")
    converter.write(tmp_path, {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert tokenizer("abc<|image_pad|>").input_ids == [257, config["image_token_id"]]
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 258


def test_the_converter_refuses_a_list_that_is_no_byte_pair_encoding():
    converter = _script("make_qwen_size_model")
    with pytest.raises(ValueError, match="rank 256 falls into 3 parts"):
        converter.convert({bytes([byte]): byte for byte in range(256)} | {b"abc": 256})


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
