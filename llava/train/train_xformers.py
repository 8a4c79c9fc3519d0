"""LLaVA's third entry. xformers' memory-efficient kernel is part of torch's sdpa today, so that is what runs."""

from llava.train.llama_xformers_attn_monkey_patch import replace_llama_attn_with_xformers_attn
from llava.train.train import main, train

__all__ = ["main", "replace_llama_attn_with_xformers_attn", "train"]

if __name__ == "__main__":
    raise SystemExit(main(attn_implementation="sdpa"))
