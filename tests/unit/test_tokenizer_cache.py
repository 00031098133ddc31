import json
import os
import subprocess
import sys

import pytest
from tests.models import write_llava15, write_qwen2_audio
from tiny_tokenizer import build
from transformers import AutoTokenizer

from mmprep import embedded
from mmprep.errors import StartupError
from mmprep_frontend.render import tokenizer_cache
from mmprep_frontend.render.loaded_tokenizer import load_tokenizer
from mmprep_frontend.render.tokenizer_cache import Kept, TokenizerCache, key_of

TEXTS = [
    "What is in this image?",
    "Größe … “x”\n\n  y ",
    "a<|im_end|>b<|image_pad|><image>c",
    "ﬁ café \u0000 \U0001f600",
    "",
]
KEPT = Kept("{}", False, {}, "right")


@pytest.fixture
def cache(tmp_path):
    return TokenizerCache(tmp_path / "cache" / "tokenizers")


@pytest.fixture
def model(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    return made


@pytest.fixture
def directory(model):
    return build(model)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "tokenizers").iterdir())


@pytest.mark.parametrize(
    "write",
    [lambda _: embedded.path(), write_llava15, write_qwen2_audio, build, lambda path: build(path, surrounded=True)],
    ids=["embedded", "llava", "qwen2_audio", "tiny", "surrounded"],
)
def test_a_kept_tokenizer_is_the_one_that_transformers_makes(write, cache, model, tmp_path):
    directory = write(model)
    load_tokenizer(directory, cache)
    kept, reference = load_tokenizer(directory, cache), AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert len(files(tmp_path)) == 1
    assert kept.backend.to_str() == reference.backend_tokenizer.to_str()
    assert kept.special_tokens == {name: str(token) for name, token in reference.special_tokens_map.items()}
    assert kept.truncation_side == reference.truncation_side
    # What a publisher left in of these is switched off before a text is encoded.
    for backend in (kept.backend, reference.backend_tokenizer):
        backend.no_truncation()
        backend.no_padding()
    for special in (False, True):
        for text in TEXTS:
            ids = kept.backend.encode(text, add_special_tokens=special).ids
            assert ids == reference.backend_tokenizer.encode(text, add_special_tokens=special).ids
            assert kept.backend.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_split_where_the_configuration_says_so(split, cache, directory):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": split}))
    made, kept = load_tokenizer(directory, cache), load_tokenizer(directory, cache)
    for tokenizer in (made, kept):
        tokenizer.backend.no_padding()
        tokenizer.backend.no_truncation()
    ids = kept.backend.encode("a<|im_end|>").ids
    assert ids == made.backend.encode("a<|im_end|>").ids
    assert (len(ids) > 2) is split


def test_a_second_start_does_without_transformers(directory, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from mmprep_frontend.render.loaded_tokenizer import load_tokenizer\n"
        "from mmprep_frontend.render.tokenizer_cache import TokenizerCache\n"
        "load_tokenizer(Path(sys.argv[1]), TokenizerCache(Path(sys.argv[2])))\n"
        "print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, directory, tmp_path / "cache"]
    told = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)]
    assert told == [b"True\n", b"False\n"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "another.txt"])
def test_a_tokenizer_is_made_anew_where_any_file_has_changed(name, directory, monkeypatch):
    before = key_of(directory)
    assert key_of(directory) == before
    path = directory / name
    path.write_bytes((path.read_bytes() if path.exists() else b"{}") + b" ")
    changed = key_of(directory)
    assert changed != before
    # A file that is too large to be read counts by its size and date.
    monkeypatch.setattr(tokenizer_cache, "_READ_BYTES", 1)
    dated = key_of(directory)
    os.utime(path, ns=(0, 0))
    assert len({before, changed, dated, key_of(directory)}) == 4


def test_a_tokenizer_is_made_anew_for_another_directory_or_version(directory, monkeypatch):
    before = key_of(directory)
    moved = directory.rename(directory.with_name("moved"))
    assert key_of(moved) != before
    moved.rename(directory)
    monkeypatch.setattr(tokenizer_cache.importlib.metadata, "version", lambda _: "0")
    assert key_of(directory) != before


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "no tokenizer"])
def test_a_damaged_file_is_as_if_it_were_not_there_and_is_replaced(damage, cache, directory, tmp_path):
    expected = load_tokenizer(directory, cache).backend.to_str()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    if damage == "no tokenizer":
        cache.put(key_of(directory), KEPT)
    else:
        path.write_bytes({"cut": whole[:-1], "changed": whole[:99] + b"x" + whole[100:], "empty": b""}[damage])
    assert load_tokenizer(directory, cache).backend.to_str() == expected
    assert path.read_bytes() == whole


def test_without_a_place_to_write_a_tokenizer_is_made_each_time(directory, tmp_path):
    (tmp_path / "file").touch()
    cache = TokenizerCache(tmp_path / "file" / "tokenizers")
    made = [load_tokenizer(directory, cache).backend.to_str() for _ in range(2)]
    assert made == [load_tokenizer(directory).backend.to_str()] * 2


def test_a_directory_that_is_not_there_stops_the_start_and_leaves_nothing(cache, tmp_path):
    with pytest.raises(StartupError):
        load_tokenizer(tmp_path / "none", cache)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_whose_files_are_replaced_while_it_is_made_is_not_kept(cache, directory, tmp_path, monkeypatch):
    make = AutoTokenizer.from_pretrained

    def replaced(*arguments, **options):
        made = make(*arguments, **options)
        (directory / "more.json").write_text("{}")
        return made

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", replaced)
    load_tokenizer(directory, cache)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    load_tokenizer(directory, cache)
    assert len(files(tmp_path)) == 1
