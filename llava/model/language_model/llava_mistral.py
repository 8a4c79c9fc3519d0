"""LLaVA on Mistral."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel

from llava import selftest
from llava.model.language_model.causal_lm import LlavaCausalLM
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    """Mistral's configuration plus LLaVA's `mm_*` keys, which are plain attributes."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral's decoder with a vision tower and a projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """LLaVA with a Mistral backbone. See `LlavaCausalLM` for what differs from the host class."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig):
        selftest.ensure()
        # The host's constructor would build a decoder without vision first.
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llava_mistral", LlavaMistralConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM, exist_ok=True)
