"""LLaVA-1.5 with dual-stage visual token reduction, under LLaVA's module names."""

from llava.model import LlavaLlamaForCausalLM

__all__ = ["LlavaLlamaForCausalLM"]
