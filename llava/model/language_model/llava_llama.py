"""LLaVA on Llama (Vicuna)."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava import selftest
from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.llava_arch import LlavaMetaModel


class LlavaConfig(LlamaConfig):
    """Llama's configuration plus LLaVA's `mm_*` keys, which are plain attributes."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's decoder with a vision tower and a projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):
    """LLaVA with a Llama backbone. See `LlavaCausalLM` for what differs from the host class."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        selftest.ensure()
        # The host's constructor would build a decoder without vision first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_llama", LlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
