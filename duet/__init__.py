"""DUET: dual-stage visual token reduction for vision-language models."""

from duet import tested

try:
    from duet.attach import attach, detach, handle
    from duet.config import DuetConfig
    from duet.decoder import run_decoder
    from duet.loss import causal_lm_loss
    from duet.tracing import trace
    from duet.vision import encode_vision
except (ImportError, AttributeError) as error:  # a library that calls things otherwise, or lacks one of its own
    raise ImportError(tested.explained(error), name=getattr(error, "name", None)) from error

__version__ = "0.1.0"
__all__ = ["DuetConfig", "attach", "causal_lm_loss", "detach", "encode_vision", "handle", "run_decoder", "trace"]
