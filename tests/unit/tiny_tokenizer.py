"""A small model directory with a tokenizer and a chat template of Qwen2-VL's kind, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmprep.card import ModelCard, Placeholder

IMAGE = "<|image_pad|>"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE,
    "<|video_pad|>",
)
CORPUS = (
    "system user assistant tool You are a helpful assistant. Describe the picture, please.",
    "What is in this image? There are two cats on a sofa, and one of them sleeps.",
    '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}',
    "<tool_call> </tool_call> Für Größe und Übermut: 0123456789 äöü ß … “quoted”",
)
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}{{ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}
        {{- raise_exception('no developers, and no <|image_pad|>') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image_url' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function.name + ' ' + call.function.arguments | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
#: For a template that takes only strings.
STRING_TEMPLATE = """\
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}"""


def build(directory: Path, *, chat_template: str = CHAT_TEMPLATE, surrounded: bool = False) -> Path:
    """Write the model directory; `surrounded`: the tokenizer puts special tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if surrounded:
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<|im_start|>", "<|endoftext|>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A <|endoftext|>", special_tokens=ids
        )
    # What a careless publisher leaves in: nothing may ever be cut or filled up by it.
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "qwen2_vl", "transformers_version": "5.20.0"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def card(directory: Path, *modalities: str) -> ModelCard:
    """Return the card of a model of Qwen2-VL's kind that takes `modalities`."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    placeholders = tuple(
        Placeholder(
            modality=modality,
            token=f"<|{modality}_pad|>",
            token_id=tokenizer.token_to_id(f"<|{modality}_pad|>"),
            part_text=f"<|vision_start|><|{modality}_pad|><|vision_end|>",
        )
        for modality in modalities or ("image", "video")
    )
    return ModelCard("qwen2_vl", b"fingerprint", placeholders, {"image": ("uint8", "float32")}, {})
