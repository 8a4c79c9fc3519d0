"""LLaVA's FlashAttention entry: flash_attention_2 where it is installed, otherwise sdpa with a notice."""

from llava.train.train import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    raise SystemExit(main(attn_implementation="flash_attention_2"))
