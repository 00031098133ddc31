"""Writes the few files of a model directory that the families read: configurations of published models, no weights."""

import json

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mmprep_worker.models.family import MediaLimits


def limits(image_pixels=178_956_970, video_frames=768, video_seconds=3600.0, audio_seconds=3600.0):
    return MediaLimits(image_pixels, video_frames, video_seconds, audio_seconds)


QWEN2_TOKENS = (
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

QWEN2_VL = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
QWEN3_VL = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
LLAVA = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": CLIP_MEAN,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": CLIP_STD,
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


def write_json(path, plain):
    path.write_text(json.dumps(plain))


def write_tokenizer(directory, tokens):
    """Write a byte-level tokenizer without merges, with ``tokens`` added; return their ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in tokens}


def write_qwen2_vl(directory, model_type="qwen2_vl", processor=None):
    """Write a Qwen2-VL directory; return its tokens' ids."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, QWEN2_TOKENS)
    config = {
        "model_type": model_type,
        "transformers_version": "5.23.0",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    write_json(directory / "config.json", config)
    write_json(directory / "preprocessor_config.json", QWEN2_VL if processor is None else processor)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return ids


def write_llava(directory):
    """Write a LLaVA-1.5 directory; return its tokens' ids."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(directory, ("<unk>", "<s>", "</s>", "<pad>", "<image>"))
    write_json(
        directory / "config.json",
        {"model_type": "llava", "transformers_version": "5.23.0", "image_token_index": ids["<image>"]},
    )
    write_json(directory / "preprocessor_config.json", LLAVA)
    write_json(
        directory / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    return ids
