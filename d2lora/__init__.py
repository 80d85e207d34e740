"""d2lora: grids of two-phase LoRA training (D2LoRA), from one command to a table."""

import logging
import os

__version__ = "0.1.0"

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL keeps ORPO there; its notice would stand among our lines
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # on a CPU it asks each process for kernels that nothing here uses
