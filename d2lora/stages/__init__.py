"""List the kinds of stages. Each is a file: what its key covers (Spec, VERSION), which of them a cell has, and the
work.
"""

from collections.abc import Callable
from typing import Any

from d2lora.records import Result
from d2lora.stages import adapt, contamination, evaluate, flips, merge, prepare, warmup
from d2lora.stages.run import Run
from d2lora.stages.stage import Spec, Stage

# Every kind with its work, in the order in which plans list them.
KINDS: dict[type[Spec], Callable[[Run[Any]], Result]] = {
    contamination.ContaminationSpec: contamination.work,
    flips.FlipsSpec: flips.work,
    prepare.PrepareSpec: prepare.work,
    warmup.WarmupSpec: warmup.work,
    adapt.AdaptSpec: adapt.work,
    merge.MergeSpec: merge.work,
    evaluate.EvaluateSpec: evaluate.work,
}
VERSIONS = {spec.KIND: spec.VERSION for spec in KINDS}

__all__ = ["KINDS", "VERSIONS", "Run", "Spec", "Stage"]
