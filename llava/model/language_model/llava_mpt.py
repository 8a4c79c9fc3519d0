"""LLaVA on MPT: the names exist so that imports work; building one is an error that says what to do."""

from __future__ import annotations

from transformers import AutoConfig, MptConfig

_MESSAGE = (
    "MPT backbones are not supported: their attention (ALiBi, fused qkv) does not fit the shared decoder loop. "
    "Use a Llama (Vicuna) or Mistral based LLaVA checkpoint."
)


class LlavaMptConfig(MptConfig):
    """MPT's configuration under LLaVA's model type."""

    model_type = "llava_mpt"


class LlavaMptForCausalLM:
    """Placeholder for LLaVA's MPT model.

    Raises:
        NotImplementedError: Always, on construction and on loading.
    """

    config_class = LlavaMptConfig

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(_MESSAGE)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Raise the same error as the constructor."""
        raise NotImplementedError(_MESSAGE)


class LlavaMptModel(LlavaMptForCausalLM):
    """Placeholder for the decoder inside LLaVA's MPT model; refuses as well."""


AutoConfig.register("llava_mpt", LlavaMptConfig, exist_ok=True)
