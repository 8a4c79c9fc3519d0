"""LLaVA's third entry. xformers' memory-efficient kernel is part of torch's sdpa today, so that is what runs."""

from llava.train.train import train

if __name__ == "__main__":
    train(attn_implementation="sdpa")
