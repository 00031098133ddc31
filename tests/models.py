"""Model directories for tests, written on the spot: published configuration values, small tokenizers, no weights.

Each function writes one directory in Hugging Face layout and returns its path. What costs time (training a tokenizer)
is done once a session. Import as ``from tests.models import write_llava15``.
"""

import json
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mmprep import embedded

TEXTS = Path(__file__).resolve().parent.parent / "scripts" / "data"

#: What CLIP's image processor subtracts and divides by; both families here use it.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

#: LLaVA-1.5's format: all pictures of a turn first, a line each, then its text.
LLAVA_TEMPLATE = """\
{%- for message in messages -%}
  {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
  {{- message.role | upper ~ ': ' if message.role != 'system' -}}
  {%- for part in parts if part.type in ('image', 'image_url') -%}{{- '<image>\\n' -}}{%- endfor -%}
  {%- for part in parts if part.type == 'text' -%}{{- part.text ~ ' ' -}}{%- endfor -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""

#: Qwen2-Audio's published template, in its latest form: it looks for a part's key, not for its type.
QWEN2_AUDIO_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN2_AUDIO_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)

QWEN2_AUDIO_PREPROCESSOR = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2AudioProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}

QWEN25_VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}

LLAVA_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}

#: Tokens of the Qwen2 vocabulary, without the special ones.
FULL_VOCABULARY = 151_643

LLAVA_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
}


def _write(path, name, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    (path / name).write_text(text, encoding="utf-8")


def write_qwen2_vl(path, *, qwen25=False, config=None, **overrides):
    """Write a Qwen2-VL or Qwen2.5-VL directory with the embedded model's tokenizer.

    Parameters
    ----------
    path:
        The directory; made if it is not there.
    qwen25:
        Write Qwen2.5-VL's configuration.
    config:
        Values that replace those of ``config.json``.
    overrides:
        Values that replace those of ``preprocessor_config.json``. Its sizes are written as published, as
        ``min_pixels`` and ``max_pixels``; ``size=`` replaces both.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for file in embedded.path().iterdir():
        (path / file.name).write_bytes(file.read_bytes())

    model = json.loads((path / "config.json").read_text())
    processor = json.loads((path / "preprocessor_config.json").read_text())
    del processor["size"]
    if "size" not in overrides:
        processor |= {"min_pixels": 3136, "max_pixels": 12845056}
    if qwen25:
        processor["processor_class"] = "Qwen2_5_VLProcessor"
        model |= {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "max_position_embeddings": 128000,
            "vision_config": QWEN25_VISION,
        }
    _write(path, "config.json", model | (config or {}))
    _write(path, "preprocessor_config.json", processor | overrides)
    return path


def write_full_size(path):
    """Write a Qwen2-VL directory of the published sizes: of pictures, of the context, and of the vocabulary.

    The vocabulary is the embedded one with as many merges more, of any two tokens, as the published one has; the special
    tokens have their published ids.
    """
    path = write_qwen2_vl(path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokens, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    shift = FULL_VOCABULARY - len(tokens)
    pieces = list(tokens)
    random = Random(7)
    while len(tokens) < FULL_VOCABULARY:
        left, right = random.choices(pieces, k=2)
        if left + right not in tokens:
            tokens[left + right] = len(tokens)
            merges.append([left, right] if isinstance(merges[0], list) else f"{left} {right}")
    for token in tokenizer["added_tokens"]:
        token["id"] += shift
    _write(path, "tokenizer.json", tokenizer)

    settings = json.loads((path / "tokenizer_config.json").read_text())
    decoder = {str(int(token_id) + shift): token for token_id, token in settings["added_tokens_decoder"].items()}
    _write(path, "tokenizer_config.json", settings | {"added_tokens_decoder": decoder})
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        for key, value in content.items():
            if key.endswith("_token_id"):
                content[key] = [one + shift for one in value] if isinstance(value, list) else value + shift
        if name == "config.json":
            content |= {"vocab_size": 151_936}
        _write(path, name, content)
    return path


def write_qwen2_audio(path, *, config=None, template=QWEN2_AUDIO_TEMPLATE, **overrides):
    """Write a Qwen2-Audio directory with the embedded model's vocabulary and the family's own special tokens.

    Parameters
    ----------
    path:
        The directory; made if it is not there.
    config:
        Values that replace those of ``config.json``.
    template:
        The chat template; published in ``chat_template.json``.
    overrides:
        Values that replace those of ``preprocessor_config.json``.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((embedded.path() / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    added = [{**first, "id": first["id"] + index, "content": token} for index, token in enumerate(QWEN2_AUDIO_TOKENS)]
    ids = {token["content"]: token["id"] for token in added}
    tokens = json.loads((embedded.path() / "tokenizer_config.json").read_text()) | {
        "additional_special_tokens": list(QWEN2_AUDIO_TOKENS[1:]),
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "model_max_length": 8192,
        "processor_class": "Qwen2AudioProcessor",
    }
    model = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "transformers_version": "5.23.0",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "activation_function": "gelu",
            "scale_embedding": False,
            "max_source_positions": 1500,
        },
        "audio_token_index": ids["<|AUDIO|>"],
        "ignore_index": -100,
        "text_config": {
            "model_type": "qwen2",
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "intermediate_size": 11008,
            "max_position_embeddings": 8192,
            "rope_theta": 10000,
            "rms_norm_eps": 1e-05,
            "sliding_window": 32768,
            "use_mrope": False,
            "vocab_size": 6272,
        },
        "vocab_size": 6272,
    }
    _write(path, "config.json", model | (config or {}))
    _write(path, "preprocessor_config.json", QWEN2_AUDIO_PREPROCESSOR | overrides)
    _write(path, "tokenizer.json", tokenizer | {"added_tokens": added})
    _write(path, "tokenizer_config.json", tokens)
    _write(path, "chat_template.json", {"chat_template": template})
    return path


def write_qwen3_vl(path):
    """Write a Qwen3-VL directory with the embedded model's tokenizer, and processors as published."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for file in embedded.path().iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    model = json.loads((path / "config.json").read_text())
    model |= {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
    processor = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    pictures = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    videos = {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    _write(path, "config.json", model)
    _write(path, "preprocessor_config.json", processor | pictures)
    _write(path, "video_preprocessor_config.json", processor | videos)
    return path


@cache
def _llama_tokenizer():
    """Return ``tokenizer.json`` of a small tokenizer that works as Llama's: ``▁`` for spaces, bytes for the unknown."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=400,
        show_progress=False,
    )
    texts = [(TEXTS / name).read_text(encoding="utf-8") for name in ("alice.txt", "pictures.txt", "languages.txt")]
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n")), trainer)
    trained = json.loads(tokenizer.to_str())["model"]

    first_added = len(trained["vocab"])
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": first_added, "<pad>": first_added + 1}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, start, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": trained,
    }


def _llava_config(image_token_id, pad_token_id):
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "transformers_version": "5.23.0",
        "image_token_index": image_token_id,
        "image_token_id": image_token_id,
        "image_seq_length": 576,
        "pad_token_id": pad_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "vocab_size": -(-(pad_token_id + 1) // 64) * 64,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }


def write_llava15(path):
    """Write a LLaVA-1.5 directory: CLIP at 336 pixels, 576 positions a picture, a Llama-like tokenizer."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _llama_tokenizer()
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    _write(path, "tokenizer.json", tokenizer)
    _write(path, "chat_template.jinja", LLAVA_TEMPLATE)
    _write(path, "config.json", _llava_config(added["<image>"], added["<pad>"]))
    _write(path, "preprocessor_config.json", LLAVA_PREPROCESSOR)
    _write(path, "processor_config.json", LLAVA_PROCESSOR)
    _write(
        path,
        "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "processor_class": "LlavaProcessor",
            "model_max_length": 4096,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<image>"],
            "padding_side": "left",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in tokenizer["added_tokens"]
            },
        },
    )
    return path
