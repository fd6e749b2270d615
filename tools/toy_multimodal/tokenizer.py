"""The tokenizer of the multimodal toy models: the text one, four ids for images, and a template that knows them."""

from __future__ import annotations

from pathlib import Path

from toy_multimodal.world import MARK
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TEXT_TOKENIZER = Path(__file__).resolve().parents[1] / "toy" / "models" / "student"
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"  # 512 to 515
VOCAB_SIZE = 516
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part['text'] }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped text tokenizer, extended."""
    tokenizer = AutoTokenizer.from_pretrained(str(TEXT_TOKENIZER))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", START, END, IMAGE, VIDEO]})
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens instead of {VOCAB_SIZE}")
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, counts: list[int]) -> list[int]:
    """Token ids of a prompt up to where the assistant speaks; each mark becomes as many placeholders as is counted."""
    text, *rest = prompt.split(MARK)
    parts: list[dict[str, str]] = [{"type": "text", "text": text}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    images = iter(counts)
    ids: list[int] = []
    for token in tokenizer(chat, add_special_tokens=False)["input_ids"]:
        ids += [token] * (next(images) if token == tokenizer.convert_tokens_to_ids(IMAGE) else 1)
    return ids
