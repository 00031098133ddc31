"""From a model directory to its family.

``config.json`` names the model type; a family with a kernel of its own takes the directory if it honours the image
processor's configuration exactly, and the generic Hugging Face family takes the rest. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import blake3
import msgspec

from mmprep.card import Placeholder
from mmprep.errors import StartupError
from mmprep_worker.images.decode import DECODER_VERSION, WHITE, Background, libraries
from mmprep_worker.images.resample import KERNEL_VERSION
from mmprep_worker.models import qwen2_vl
from mmprep_worker.models.family import Family, MediaLimits

#: Their versions may change pixels or ids.
_DECIDING = ("transformers", "pillow", "simplejpeg", "numpy")


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of ``tokenizer.json`` that is needed here; the vocabulary is skipped without being built."""

    added_tokens: list[_AddedToken] = []


def fingerprint(**parts: Any) -> bytes:
    """Return 32 bytes that change with ``parts``, and with the version of whatever decides over pixels: our own code,
    packages, and the libraries that Pillow was built with.

    Parameters
    ----------
    parts:
        Plain JSON data: the processor's class and configuration, token ids.
    """
    versions = {name: importlib.metadata.version(name) for name in _DECIDING}
    own = {"kernel": KERNEL_VERSION, "decoder": DECODER_VERSION, "versions": versions, "libraries": libraries()}
    canonical = json.dumps({**parts, **own}, sort_keys=True, default=str)
    return blake3.blake3(canonical.encode()).digest()


def load_family(model_dir: Path, limits: MediaLimits, background: Background = WHITE) -> Family:
    """Return the family of the model in ``model_dir``.

    Parameters
    ----------
    model_dir:
        In Hugging Face layout; weights are not needed.
    limits:
        Of one medium.
    background:
        What transparency of pictures is put on; part of the fingerprint.

    Raises
    ------
    StartupError
        The directory or a file in it is missing or broken, or the model's processor can't run here.
    """
    if not model_dir.is_dir():
        raise StartupError(f"MODEL: {model_dir.name!r} is no directory; give a local one in Hugging Face layout")
    config = _read(model_dir, "config.json")
    if config.get("model_type") == "qwen2_audio":
        family = _qwen2_audio(model_dir, config, limits)
        if family is not None:
            return family
    named = partial(fingerprint, background=background)
    if config.get("model_type") in qwen2_vl.MODEL_TYPES:
        processor = _section(model_dir, "image_processor")
        settings = qwen2_vl.read_settings(processor)
        if settings is not None:
            placeholder = _qwen2_vl_placeholder(model_dir, config)
            digest = named(
                processor="Qwen2VLImageProcessor", config=processor, placeholder=msgspec.to_builtins(placeholder)
            )
            return qwen2_vl.Qwen2VLFamily(
                settings,
                placeholder,
                fingerprint=digest,
                limits=limits,
                background=background,
                embeds_width=qwen2_vl.embeds_width(config),
            )
    from mmprep_worker.models.generic_hf import load_generic  # noqa: PLC0415, transformers is slow to import and large

    return load_generic(model_dir, config, fingerprint=named, limits=limits, background=background)


def _read(model_dir: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in file ``name``."""
    try:
        plain = json.loads((model_dir / name).read_bytes())
    except FileNotFoundError:
        raise StartupError(f"MODEL: {name} is missing from {model_dir.name!r}; copy the whole model") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"MODEL: {name} cannot be read ({type(error).__name__}); copy it again") from None
    if not isinstance(plain, dict):
        raise StartupError(f"MODEL: {name} does not hold a JSON object; copy it again")
    return plain


def _section(model_dir: Path, part: str) -> dict[str, Any]:
    """Return the configuration of a part of the processor, as ``image_processor``.

    A section of ``processor_config.json`` wins over ``preprocessor_config.json``, as in transformers.
    """
    if (model_dir / "processor_config.json").exists():
        section = _read(model_dir, "processor_config.json").get(part)
        if isinstance(section, dict):
            return section
    return _read(model_dir, "preprocessor_config.json")


def _added_tokens(model_dir: Path) -> dict[int, str]:
    """Return the texts of the tokens that were added to the vocabulary, by id."""
    path = model_dir / "tokenizer.json"
    if path.exists():
        try:
            tokens = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).added_tokens
        except (OSError, msgspec.DecodeError) as error:
            raise StartupError(f"MODEL: tokenizer.json cannot be read ({error}); copy it again") from None
        return {token.id: token.content for token in tokens}
    plain = _read(model_dir, "tokenizer_config.json").get("added_tokens_decoder", {})
    try:
        return {int(number): token["content"] for number, token in plain.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise StartupError("MODEL: tokenizer_config.json: added_tokens_decoder is not as expected") from None


def _qwen2_audio(model_dir: Path, config: Mapping[str, Any], limits: MediaLimits) -> Family | None:
    """Return the family of a Qwen2-Audio directory, ``None`` where its kernel can't honour the configuration."""
    from mmprep_worker.audio.logmel import KERNEL_VERSION as LOGMEL_VERSION  # noqa: PLC0415, only models that take sound need its codecs
    from mmprep_worker.audio.recording import decoders  # noqa: PLC0415, as above
    from mmprep_worker.models import qwen2_audio  # noqa: PLC0415, as above

    extractor = _section(model_dir, "feature_extractor")
    settings = qwen2_audio.read_settings(extractor)
    if settings is None:
        return None
    placeholder = _qwen2_audio_placeholder(model_dir, config)
    digest = fingerprint(
        processor="Qwen2AudioProcessor",
        config=extractor,
        placeholder=msgspec.to_builtins(placeholder),
        decoders={**decoders(), "logmel": LOGMEL_VERSION},
    )
    return qwen2_audio.Qwen2AudioFamily(settings, placeholder, fingerprint=digest, limits=limits)


def _qwen2_audio_placeholder(model_dir: Path, config: Mapping[str, Any]) -> Placeholder:
    """Return the audio placeholder: the id of ``config.json``, or of the token's usual name, with the tokenizer's text."""
    texts = _added_tokens(model_dir)
    ids = {text: number for number, text in texts.items()}
    number = config.get("audio_token_id", config.get("audio_token_index", ids.get("<|AUDIO|>")))
    if not isinstance(number, int) or number not in texts:
        raise StartupError(
            f"MODEL: the tokenizer has no added token for config.json's audio_token_index ({number}), usually <|AUDIO|>; "
            "the tokenizer's files and config.json must be of the same model"
        )
    token = texts[number]
    return Placeholder("audio", token, number, f"<|audio_bos|>{token}<|audio_eos|>")


def _qwen2_vl_placeholder(model_dir: Path, config: Mapping[str, Any]) -> Placeholder:
    """Return the image placeholder: ids of ``config.json``, or of the tokens' usual names, with the tokenizer's texts."""
    texts = _added_tokens(model_dir)
    ids = {text: number for number, text in texts.items()}

    def text_of(option: str, usual: str) -> str:
        number = config.get(option, ids.get(usual))
        if not isinstance(number, int) or number not in texts:
            raise StartupError(
                f"MODEL: the tokenizer has no added token for config.json's {option} ({number}), usually {usual}; "
                "the tokenizer's files and config.json must be of the same model"
            )
        return texts[number]

    start = text_of("vision_start_token_id", "<|vision_start|>")
    image = text_of("image_token_id", "<|image_pad|>")
    end = text_of("vision_end_token_id", "<|vision_end|>")
    return Placeholder("image", image, ids[image], start + image + end)
