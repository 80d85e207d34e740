"""Weights & Biases mirrors the records; it is never the source of a number.

The worker calls `stage` around a stage and `cell` after a cell, a training `log` at its steps, the sweep's process `report`; each
process ends with `flush`. `dashboard.write` is a command's. What runs show is in runs.py, how they are sent in sender.py.
"""

from d2lora.mirror.runs import cell, log, report, stage, where_cell
from d2lora.mirror.sender import flush

__all__ = ["cell", "flush", "log", "report", "stage", "where_cell"]
