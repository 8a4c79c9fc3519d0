"""Training: LLaVA's entry points, data path and trainer."""

import logging

# It reports a missing optional kernel at every import, in every process.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
