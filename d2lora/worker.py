"""Do a share of a grid: one stage after another, each published, or its failure recorded."""

import contextlib
import itertools
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2lora import data, mirror, plan
from d2lora.errors import UserError
from d2lora.evaluate import vllm
from d2lora.outputs import Outputs, write_json
from d2lora.plan import Cell
from d2lora.progress import Progress
from d2lora.provenance import peak_memory_mb, provenance, reset_peak_memory
from d2lora.records import Provenance, Record
from d2lora.settings import Config
from d2lora.stages import KINDS, Run, Stage
from d2lora.stages.evaluate import EvaluateSpec, asks_engine
from d2lora.stages.run import AfterOthers
from d2lora.store import Store


def do(
    config: Config, cell: Cell, store: Store, watch: Callable[[Stage], Progress], others: Sequence[Cell] = ()
) -> list[Stage]:
    """Do the stages that `config.job` names (all of the cell's if it is empty), in order. Return those that failed or were
    blocked.

    They are the cell's, or of a shared job those of `others`, too. A failure is written to <output>/failed; it blocks the
    stages that depend on it and no others.
    """
    cells = (cell, *others)
    owners = {s.key: c for c in reversed(cells) for s in c.chain.stages}
    if unknown := set(config.job or ()) - owners.keys():
        raise UserError(
            f"job={','.join(sorted(unknown))}: not a stage of this cell: the code or the data changed since the sweep was planned; start it again"
        )
    every = plan.stages(cells) if others else cell.chain.stages
    wanted = [stage for stage in every if config.job is None or stage.key in config.job]
    try:
        lost = _do_each(wanted, lambda s: owners[s.key].config if others else config, store, watch)
    finally:
        vllm.close()
    for each in cells:
        mirror.cell(each, store)
    mirror.flush(config)
    return lost


def _do_each(
    wanted: Sequence[Stage], config_of: Callable[[Stage], Config], store: Store, watch: Callable[[Stage], Progress]
) -> list[Stage]:
    """Do stages in order, and return those that failed or were blocked. Those that have to wait for an engine are the last."""
    lost: list[Stage] = []
    last: list[Stage] = []
    for index, stage in enumerate(itertools.chain(wanted, last)):
        if not all(map(store.done, stage.parents)):
            lost.append(stage)
            continue
        try:
            beside = _beside(stage, wanted[index + 1 :], store)
            do_stage(config_of(stage), stage, store, watch(stage), beside)
            store.outputs.failed(stage.key).unlink(missing_ok=True)
        except AfterOthers:
            last.append(stage)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a launcher must see neither: sys.exit in a stage ends this stage only
            write_failure(store.outputs, stage.key, stage.label, error)
            lost.append(stage)
    return lost


def _beside(stage: Stage, later: Sequence[Stage], store: Store) -> tuple[Stage, ...]:
    """Return the later stages that an engine does together with this one: evaluations of what is trained, not done yet."""
    if not asks_engine(stage):
        return ()
    ready = (s for s in later if asks_engine(s) and all(map(store.done, s.parents)))
    return tuple(s for s in ready if not store.done(s))


def do_stage(config: Config, stage: Stage, store: Store, progress: Progress, beside: tuple[Stage, ...] = ()) -> Record:
    """Do one stage of the cell, unless it is done already, and return its record. Its parent must be done.

    `beside` are evaluations that an engine may answer in the same call.
    """

    def work(folder: Path) -> Record:
        mirrored.enter_context(mirror.stage(config, stage, store, may_wait=bool(beside)))
        return _record(Run(config, stage, folder, progress, beside=beside))

    with contextlib.ExitStack() as mirrored:  # left once the record is published: that is what is mirrored
        record = store.ensure(stage, work)
    shutil.rmtree(store.outputs.checkpoints / stage.key, ignore_errors=True)
    return record


def _record(run: Run[Any]) -> Record:
    """Do a stage's work, and return its record: the result and its provenance."""
    stage, started, clock = run.stage, datetime.now(UTC), time.monotonic()
    reset_peak_memory()
    if type(stage.spec) is not EvaluateSpec:
        vllm.close()  # an engine holds the memory that others need
    result = KINDS[type(stage.spec)](run)
    files = {str(f.relative_to(run.folder)): data.digest(f) for f in sorted(run.folder.rglob("*")) if f.is_file()}
    return Record(
        key=stage.key,
        stage=stage.kind,
        label=stage.label,
        version=stage.spec.VERSION,
        spec=stage.spec.content(),
        parent=stage.parent.key if stage.parent else None,
        **result.as_read(),
        files=files,
        provenance=Provenance.model_validate(provenance() | {"started": started.isoformat(timespec="seconds")}),
        seconds=round(time.monotonic() - clock - run.load_seconds, 3),
        load_seconds=round(run.load_seconds, 3),
        peak_memory_mb=peak_memory_mb(),
    )


def write_failure(outputs: Outputs, key: str, label: str, error: BaseException) -> None:
    """Write <output>/failed/<key>.json: the stage, the error and the traceback."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = "".join(traceback.format_exception(error))
    write_json(outputs.failed(key), {"key": key, "label": label, "error": kind + line, "traceback": text})
