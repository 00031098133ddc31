"""From a model directory to its family.

``config.json`` names the model type; a family with a kernel of its own takes the directory if it honours the image
processor's configuration exactly, and the generic Hugging Face family takes the rest. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import msgspec
from tokenizers import Tokenizer

from mmprep.card import Placeholder
from mmprep.errors import StartupError
from mmprep_worker.images.decode import DECODER_VERSION, WHITE, Background, libraries
from mmprep_worker.images.resample import KERNEL_VERSION
from mmprep_worker.models import qwen2_vl
from mmprep_worker.models.family import Family, MediaLimits
from mmprep_worker.models.qwen2_vl_settings import (
    QWEN2_VIDEOS,
    QWEN3_VIDEOS,
    Settings,
    embeds_width,
    read_settings,
    read_video_settings,
)
from mmprep_worker.models.qwen2_vl_video import TimeMarks, Videos
from mmprep_worker.models.qwen3_vl_times import TimeTokens

#: Their versions may change pixels or ids. FFmpeg's comes with that of av.
_DECIDING = ("transformers", "pillow", "simplejpeg", "numpy", "av")
_log = logging.getLogger(__name__)


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
        processor = _processor(model_dir, "image_processor", "preprocessor_config.json")
        settings = read_settings(processor)
        if settings is not None:
            return _qwen2_vl(model_dir, config, settings, processor, limits=limits, background=background)
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


def _processor(model_dir: Path, section: str, *files: str) -> dict[str, Any]:
    """Return a processor's configuration: a section of ``processor_config.json``, else the first file, as transformers."""
    if (model_dir / "processor_config.json").exists():
        found = _read(model_dir, "processor_config.json").get(section)
        if isinstance(found, dict):
            return found
    return _read(model_dir, next((name for name in files if (model_dir / name).exists()), files[-1]))


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

    extractor = _processor(model_dir, "feature_extractor", "preprocessor_config.json")
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


class _Marks(NamedTuple):
    """The special tokens of Qwen2-VL and its successors around and in place of media: texts and ids."""

    texts: dict[int, str]
    image: int
    video: int | None
    start: int
    end: int

    def placeholder(self, modality: str, token_id: int) -> Placeholder:
        token = self.texts[token_id]
        return Placeholder(modality, token, token_id, self.texts[self.start] + token + self.texts[self.end])


def _qwen2_vl_marks(model_dir: Path, config: Mapping[str, Any]) -> _Marks:
    """Return the marks: ids of ``config.json``, or of the tokens' usual names, with the tokenizer's texts."""
    texts = _added_tokens(model_dir)
    ids = {text: number for number, text in texts.items()}

    def id_of(option: str, usual: str) -> int:
        number = config.get(option, ids.get(usual))
        if not isinstance(number, int) or number not in texts:
            raise StartupError(
                f"MODEL: the tokenizer has no added token for config.json's {option} ({number}), usually {usual}; "
                "the tokenizer's files and config.json must be of the same model"
            )
        return number

    start = id_of("vision_start_token_id", "<|vision_start|>")
    image = id_of("image_token_id", "<|image_pad|>")
    end = id_of("vision_end_token_id", "<|vision_end|>")
    named = "video_token_id" in config or "<|video_pad|>" in ids
    return _Marks(texts, image, id_of("video_token_id", "<|video_pad|>") if named else None, start, end)


def _qwen2_vl(
    model_dir: Path,
    config: Mapping[str, Any],
    settings: Settings,
    processor: Mapping[str, Any],
    *,
    limits: MediaLimits,
    background: Background,
) -> Family:
    marks = _qwen2_vl_marks(model_dir, config)
    placeholder = marks.placeholder("image", marks.image)
    # The image processor's file is there, so one of these is.
    video_files = ("video_preprocessor_config.json", "preprocessor_config.json")
    of_videos = _processor(model_dir, "video_processor", *video_files) if marks.video is not None else None
    videos = None if of_videos is None else _qwen2_vl_videos(model_dir, config, marks, of_videos, limits)
    digest = fingerprint(
        background=background,
        model=config["model_type"],
        processor="Qwen2VLImageProcessor",
        config=processor,
        placeholder=msgspec.to_builtins(placeholder),
        videos=None if videos is None else [of_videos, msgspec.to_builtins(videos.placeholder), limits.video_frames],
    )
    return qwen2_vl.Qwen2VLFamily(
        settings,
        placeholder,
        fingerprint=digest,
        limits=limits,
        background=background,
        videos=videos,
        embeds_width=embeds_width(config),
    )


def _qwen2_vl_videos(
    model_dir: Path, config: Mapping[str, Any], marks: _Marks, processor: Mapping[str, Any], limits: MediaLimits
) -> Videos | None:
    """Return the family's videos, or ``None``, with a word in the log, where their configuration can't be honoured."""
    kind = config["model_type"]
    third = kind.startswith("qwen3")
    settings = read_video_settings(processor, QWEN3_VIDEOS if third else QWEN2_VIDEOS)
    if settings is None or marks.video is None or settings.frame.factor > 4096:
        _log.warning(
            "the model takes no videos here: the configuration of its video processor is not one that is known"
        )
        return None
    placeholder = marks.placeholder("video", marks.video)
    if not third:
        return Videos(settings, placeholder, limits, rated=kind == "qwen2_5_vl")
    times = TimeMarks(TimeTokens(_tokenizer(model_dir)), marks.start, marks.end)
    return Videos(settings, placeholder, limits, marks=times)


def _tokenizer(model_dir: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001, tokenizers raises nothing narrower
        raise StartupError(
            f"MODEL: tokenizer.json cannot be read ({type(error).__name__}), and the times of videos need it; copy it again"
        ) from None
