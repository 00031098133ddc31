#!/usr/bin/env python3
"""Train the tokenizer of the embedded demonstration model from the texts in ``scripts/data``.

Usage: ``train_embedded_tokenizer.py [DIRECTORY]``; without an argument the files of the package are rewritten. Writes
``tokenizer.json`` and ``tokenizer_config.json``. The same texts always give the same bytes; a test holds that.

The tokenizer works as Qwen2's does: NFC, Qwen2's split into words, byte-level BPE, and its special tokens behind the
ordinary ones in Qwen2-VL's order. Only the vocabulary is smaller. The library trains; the files' layout is decided
here, so that they change with the texts alone and not with the library's way of writing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

SCRIPTS = Path(__file__).resolve().parent
PACKAGE_MODEL = SCRIPTS.parent / "shared" / "mmprep" / "embedded" / "model"

#: Ordinary tokens: 256 bytes and what is merged from them. Special tokens get the ids from here on.
VOCABULARY = 6144

#: How often each text is read. The short modern ones would drown in the two books otherwise.
TEXTS = {"alice.txt": 1, "as_you_like_it.txt": 1, "pictures.txt": 12, "languages.txt": 8, "code.txt": 8}

#: Qwen2's split into words, from its published tokenizer.json.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Qwen2-VL's special tokens in the order of their ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

MAX_LENGTH = 32768


def train() -> tuple[dict[str, int], list[str]]:
    """Return the ordinary tokens with their ids, and the merges in the order of their rank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        (SCRIPTS / "data" / name).read_text(encoding="utf-8") for name, times in TEXTS.items() for _ in range(times)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges


def added_tokens() -> list[dict[str, Any]]:
    """Return the special tokens as ``tokenizer.json`` lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": VOCABULARY + i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)]


def tokenizer_document(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
            "merges": merges,
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """Return the content of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added_tokens()
        },
    }


def main(arguments: list[str]) -> None:
    """Write both files to the directory that ``arguments`` name."""
    directory = Path(arguments[0]) if arguments else PACKAGE_MODEL
    vocab, merges = train()
    for name, content in (
        ("tokenizer.json", tokenizer_document(vocab, merges)),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    print(f"{len(vocab)} tokens, {len(merges)} merges and {len(SPECIAL_TOKENS)} special tokens in {directory}")


if __name__ == "__main__":
    main(sys.argv[1:])
