"""Weights & Biases mirrors the records; it is never the source of a number.

The worker calls `stage` around a stage and `cell` after a cell, which logs the values of a training in it, the sweep's process
`report`; each process ends with `flush`. `dashboard.write` is a command's. What runs show is in runs.py, how they are sent in sender.py.
"""

from d2lora.mirror.runs import cell, report, stage, where_cell
from d2lora.mirror.sender import flush

__all__ = ["cell", "flush", "report", "stage", "where_cell"]
