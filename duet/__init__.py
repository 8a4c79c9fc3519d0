"""DUET: dual-stage visual token reduction for vision-language models."""

from duet.attach import attach, detach
from duet.config import DuetConfig
from duet.decoder import run_decoder
from duet.loss import causal_lm_loss
from duet.tracing import trace
from duet.vision import encode_vision

__version__ = "0.1.0"
__all__ = ["DuetConfig", "attach", "causal_lm_loss", "detach", "encode_vision", "run_decoder", "trace"]
