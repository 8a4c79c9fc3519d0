"""Convert checkpoints between LLaVA's layout and llava-hf's, merge LoRA folders, and cut out projectors.

    python -m llava.convert --from CHECKPOINT --to llava --out DIR
    python -m llava.convert --from CHECKPOINT --to hf --out DIR
    python -m llava.convert --from CHECKPOINT --extract-projector --out mm_projector.safetensors

CHECKPOINT is anything that `load_pretrained_model` opens: a full model in either layout, or a LoRA or projector folder
with `--base`. The weights are written in the dtype that they have, those of an adapter in that of its base.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from duet.errors import main_guard
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.eval.run_llava import choose_template
from llava.model.builder import inspect_checkpoint, load_pretrained_model, stored_dtype
from llava.model.checkpoints import newline_state, projector_state, read_projector_file, to_hf_key, to_hub_key
from llava.model.hf_layout import config_to_hf, drop_added_tokens, padded_vocabulary
from llava.tokenization import mark_words_after

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_IMAGES = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
)
_TEXT = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
)
# How the published llava-1.5 processors write a conversation; one <image> per picture, which the processor repeats.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


# The same for LLaVA-1.6's other language models: Mistral's instructions, and ChatML.
_INSTRUCT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{{{{ '[INST] ' }}}}{_IMAGES}{_TEXT}{{{{ ' [/INST]' }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ ' ' }}}}{_TEXT}{{{{ ' </s>' }}}}{{% endif %}}{{% endfor %}}"
)
_CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ SYSTEM + '<|im_end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    f"{_IMAGES}{_TEXT}{{{{ '<|im_end|>' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_template(conversation: Conversation) -> str:
    """Return the Jinja template with which a Hugging Face processor writes a model's conversations."""
    if conversation.sep_style is SeparatorStyle.LLAMA_2 and not conversation.system:
        return _INSTRUCT_TEMPLATE
    if conversation.sep_style is SeparatorStyle.MPT:
        return _CHATML_TEMPLATE.replace("SYSTEM", repr(conversation.system))
    return CHAT_TEMPLATE


def convert(source: str, target: str, out: str, base: str | None = None) -> None:
    """Write a checkpoint in another layout.

    Args:
        source: Any checkpoint that `load_pretrained_model` opens.
        target: "llava" or "hf".
        out: Folder to write; must not hold a model yet.
        base: Base model of a LoRA or projector folder.

    Raises:
        ValueError: The target folder is in use, or the model has no counterpart in the target layout.
    """
    if target not in ("llava", "hf"):
        raise ValueError(f"unknown layout {target!r}; use 'llava' or 'hf'")
    if os.path.exists(os.path.join(out, "config.json")):
        raise ValueError(f"{out} already holds a model; give another folder")
    name = os.path.basename(os.path.normpath(source))
    adapter = inspect_checkpoint(source).adapter or {}
    dtype = stored_dtype(base or adapter.get("base_model_name_or_path") or source)
    tokenizer, model, image_processor, _ = load_pretrained_model(source, base, name, device="cpu", torch_dtype=dtype)
    if image_processor is None:
        raise ValueError(f"{source} is a plain language model; there is no vision part to convert")
    if target == "hf":
        template = choose_template(name, model.config)
        write_hf(model, tokenizer, image_processor, out, chat_template(conv_templates[template]))
        return
    model.save_pretrained(out)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(out)
    drop_added_tokens(out, model.config.vocab_size)


def write_hf(model, tokenizer, image_processor, out: str, template: str = CHAT_TEMPLATE) -> None:
    """Write a model as a llava-hf folder, processor included: LLaVA-1.5's layout, or LLaVA-1.6's if it has tiles.

    Args:
        model: One of our models.
        tokenizer: Its tokenizer; `<image>` and `<pad>` are added to it.
        image_processor: The tower's.
        out: Folder.
        template: The processor's chat template.

    Raises:
        ValueError: The projector or tiling has no counterpart there.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    image_id, pad_id = vocabulary, vocabulary + 1
    config: Any = config_to_hf(model.config, image_id, pad_id, padded_vocabulary(vocabulary + 2))
    state = hf_state(model.state_dict(), config.text_config.vocab_size)
    tiled = config.model_type == "llava_next"
    with torch.device("meta"):
        exported: Any = (LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration)(config)
    exported.load_state_dict(state, strict=False, assign=True)
    _check_complete(exported, state)
    exported.to(model.dtype)
    exported.generation_config = model.generation_config
    exported.generation_config.pad_token_id = pad_id
    # The hub's names, which every version of transformers reads.
    hub = {to_hub_key(key): tensor for key, tensor in exported.state_dict().items()}
    exported.save_pretrained(out, state_dict=hub, save_original_format=False)
    add_hf_tokens(tokenizer, (image_id, pad_id))
    make_processor(config, tokenizer, image_processor, template).save_pretrained(out)


def hf_state(state: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Rename a state dict to llava-hf's names, and pad the vocabulary.

    Args:
        state: Our state dict.
        rows: Embedding rows to reach; the new ones are the mean of the old ones.
    """
    renamed = {to_hf_key(key): tensor.contiguous() for key, tensor in state.items()}
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if key in renamed:
            old = renamed[key]
            mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
            renamed[key] = torch.cat([old, mean.expand(rows - len(old), -1)])
    return renamed


def _check_complete(exported, state: dict[str, Tensor]) -> None:
    expected = set(exported.state_dict())
    tied = {"lm_head.weight"} if exported.config.tie_word_embeddings else set()
    missing, unexpected = sorted(expected - set(state) - tied), sorted(set(state) - expected)
    if missing or unexpected:
        raise ValueError(f"this model does not fit llava-hf: missing {missing[:5]}, without a place {unexpected[:5]}")
    exported.tie_weights()


def add_hf_tokens(tokenizer, ids: tuple[int, int]) -> None:
    """Add `<image>` and `<pad>` to a tokenizer, behind the vocabulary.

    Raises:
        ValueError: They do not get these ids.
    """
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if index >= ids[0]}
    if added and added != dict(zip((IMAGE_TOKEN, PAD_TOKEN), ids, strict=True)):
        raise ValueError(
            f"the tokenizer has tokens behind the vocabulary ({added}); llava-hf puts <image> and <pad> there"
        )
    # <image> first, <pad> second, as in the published models.
    image = AddedToken(IMAGE_TOKEN, special=True, normalized=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    mark_words_after(tokenizer, IMAGE_TOKEN)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, PAD_TOKEN]) != list(ids):
        raise ValueError(f"the tokenizer has {len(tokenizer) - 2} tokens, the embedding {ids[0]} rows; they must agree")
    tokenizer.padding_side = "left"


def make_processor(config, tokenizer, image_processor: CLIPImageProcessorPil, template: str) -> Any:
    """Put a Hugging Face processor together.

    Args:
        config: llava-hf's config.
        tokenizer: Has `<image>` and `<pad>`.
        image_processor: The tower's; a model with tiles gets one that cuts them.
        template: Chat template.
    """
    tiled = config.model_type == "llava_next"
    return (LlavaNextProcessor if tiled else LlavaProcessor)(
        image_processor=tiling_processor(image_processor, config.image_grid_pinpoints) if tiled else image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )


def tiling_processor(image_processor: CLIPImageProcessorPil, pinpoints: list) -> Any:
    """LLaVA-1.6's image processor around the settings of the tower's.

    Args:
        image_processor: The tower's.
        pinpoints: Candidate (height, width) of the joined tiles.
    """
    from transformers import LlavaNextImageProcessorPil

    names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    return LlavaNextImageProcessorPil(
        **{name: getattr(image_processor, name) for name in names}, image_grid_pinpoints=pinpoints
    )


def extract_projector(source: str, out: str) -> int:
    """Write the projector of a checkpoint to a file of its own, with `image_newline` if there is one.

    Args:
        source: A folder with model weights, LoRA remains or a projector; or a file.
        out: A .safetensors file, or any other for `torch.save`. Keys are LLaVA's, `model.mm_projector.*` and
            `model.image_newline`.

    Returns:
        How many tensors were written.

    Raises:
        FileNotFoundError: No weights at the source.
        ValueError: No projector in them.
    """
    tensors = read_projector_file(source)
    state = projector_state(tensors, source)
    named = {f"model.mm_projector.{key}": tensor.contiguous() for key, tensor in state.items()}
    newline = newline_state(tensors)
    if newline is not None:
        named["model.image_newline"] = newline.contiguous()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if out.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(named, out, metadata={"format": "pt"})
    else:
        torch.save(named, out)
    return len(named)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llava.convert", description="Convert LLaVA checkpoints.")
    parser.add_argument("--from", dest="source", required=True, help="checkpoint folder, file or hub name")
    parser.add_argument("--to", choices=("llava", "hf"), help="layout to write")
    parser.add_argument("--out", required=True, help="folder (or file, with --extract-projector) to write")
    parser.add_argument("--base", help="base model of a LoRA or projector folder")
    parser.add_argument("--extract-projector", action="store_true", help="write the projector's weights only")
    args = parser.parse_args(argv)
    if args.extract_projector == (args.to is not None):
        parser.error("give either --to or --extract-projector")
    if args.extract_projector:
        count = extract_projector(args.source, args.out)
        print(f"{count} projector tensors written to {args.out}")
    else:
        convert(args.source, args.to, args.out, args.base)
        print(f"{args.source} written to {args.out} in the {args.to} layout")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
