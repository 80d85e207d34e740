"""Weights & Biases mirrors the records; it is never the source of a number.

The worker calls `stage` around a stage's work and `cell` after a cell, the sweep's process `report`; each process ends
with `flush`. What runs show is in stages.py and cells.py; sender.py sends them without letting stages wait for a server.
Run ids come from keys, so a resumed stage continues its run. `dashboard.write` is a command's.
"""

from d2lora.mirror.cells import cell, report, where_cell
from d2lora.mirror.sender import flush
from d2lora.mirror.stages import stage

__all__ = ["cell", "flush", "report", "stage", "where_cell"]
