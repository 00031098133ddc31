#!/usr/bin/env python3
"""A real model on what a running service prepares: a small Qwen2-VL with random weights pulls chats from a queue.

Usage: ``real_model.py [ENDPOINT]``; the service is one of the embedded model, as ``mmprep serve`` without a MODEL starts it. Needs
``mmprep[server,torch]``.

Two photographs are posted as a chat, once for each dtype, and come back as a job with their tensors by address. The model
reads them where they lie. Its logits must be those that it computes from what transformers makes of the same chat, with its
own chat template, tokenizer and image processor; with the photographs exchanged they must not. Status 0 only if so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from mmprep import Backend, Client, embedded
from mmprep.bridges import torch as bridge
from mmprep.job import Job

QUEUE = "real-model"
PHOTOS = embedded.photos()
QUESTION = "What do these two pictures show?"


def small_model() -> Qwen2VLForConditionalGeneration:
    """Return a Qwen2-VL with the embedded model's vocabulary and patches, two thin layers a tower, and random weights."""
    config = Qwen2VLConfig.from_pretrained(embedded.path())
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 128, 2
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.layer_types = text.layer_types[:2]
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [2, 3, 3]}
    vision.depth, vision.embed_dim, vision.hidden_size, vision.num_heads = 2, 32, 64, 2
    config.dtype = text.dtype = vision.dtype = torch.float32
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).eval()


def logits(model: Any, token_ids: list[int], pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Return the model's logits of every position, shape ``(positions, vocabulary)``.

    Parameters
    ----------
    pixels:
        Normalised patches of all pictures, shape ``(patches, 1176)``.
    grids:
        Of each picture: patches in time, height and width; int64, shape ``(pictures, 3)``.
    """
    ids = torch.tensor([token_ids])
    kinds = (ids == model.config.image_token_id).int()
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds)
    return output.logits[0]


def on_job(model: Any, job: Job) -> torch.Tensor:
    """Return the logits of a job; its tensors are read where they lie in the shared memory."""
    items = job.items["image"]
    with bridge.view(job) as tensors:
        parts = tensors["image"]
        if parts[0]["pixel_values"].dtype == torch.uint8:
            parts = [bridge.normalized(item, of_item) for item, of_item in zip(items, parts, strict=True)]
        joined = bridge.join(items[0].fields, parts)
        return logits(model, job.token_ids, joined["pixel_values"].float(), joined["image_grid_thw"])


def by_transformers(model: Any, photos: tuple[Path, ...]) -> torch.Tensor:
    """Return the logits of the same chat as transformers alone prepares it."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    processor = Qwen2VLImageProcessorPil.from_pretrained(embedded.path())
    content = [*({"type": "image"} for _ in photos), {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    prepared = processor(pictures, return_tensors="pt")
    pad = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    for grid in prepared["image_grid_thw"]:
        text = text.replace(pad, "<|one of them|>" * int(grid.prod() // processor.merge_size**2), 1)
    ids = tokenizer(text.replace("<|one of them|>", pad), add_special_tokens=False).input_ids
    return logits(model, ids, prepared["pixel_values"], prepared["image_grid_thw"])


def main() -> int:
    """Do what the module's first lines say."""
    endpoint = sys.argv[1] if len(sys.argv) > 1 else None
    model = small_model()
    expected, exchanged = by_transformers(model, PHOTOS), by_transformers(model, PHOTOS[::-1])
    right = not torch.equal(expected, exchanged)
    print(f"exchanged photographs: logits differ by up to {(exchanged - expected).abs().max():.2g}")
    parts = [{"type": "image_url", "image_url": {"url": photo.read_bytes()}} for photo in PHOTOS]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    with Backend(endpoint, queue=QUEUE) as backend, Client(endpoint) as client:
        for dtype, most in (("float32", 0.0), ("uint8", 0.0), ("bfloat16", 0.01)):
            client.post(chat, queue=QUEUE, mm_dtype=dtype)
            job = next(backend)
            found = on_job(model, job)
            job.ack()
            difference = float((found - expected).abs().max())
            right = right and difference <= most
            print(f"{dtype:8} {tuple(found.shape)} logits differ by up to {difference:.2g}; may by {most}")
    print("Everything is right." if right else "Something is wrong.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
