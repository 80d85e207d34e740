"""Say how long what is left of a plan takes, what memory it needs, and what it costs: as measured here, or from FLOP and rates.

FLOP of a token, of a model of N parameters: 2 N forward and 2 N for what is passed back through the frozen weights, so 4 N of a
training step with LoRA; 2 N more of each forward pass without a backward one (a reference, once an adaptation), 2 N of a prompt and of an answer.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from d2lora import plan
from d2lora.command import sizes
from d2lora.command.hardware import Device, device, gpu_here
from d2lora.command.measured import Measured, Pace, groups_of, measured, row_group
from d2lora.command.sizes import Shape, Tokens
from d2lora.plan import Cell
from d2lora.scoring import MultipleChoice
from d2lora.settings import Benchmark, Config, Task, fields
from d2lora.settings.methods import Referenced
from d2lora.settings.recipe import PASS_TOKENS
from d2lora.stages import VERSIONS, Stage
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.contamination import ContaminationSpec
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.flips import FlipsSpec
from d2lora.stages.prepare import PrepareSpec
from d2lora.stages.training import TrainingSpec
from d2lora.stages.warmup import WarmupSpec
from d2lora.store import Store

_FIXED = 0.6  # seconds of a training beside its tokens: attach, prove, save, check
_FIXED_EVALUATION = 0.1  # and of an evaluation
_CHECK = 1.0  # seconds of an overlap check: the lab's
_CHOICES = 4  # of a multiple-choice item
_ENGINE_BATCH = 256  # sequences that an engine has at a time, as evaluate/vllm opens it
_LM_EVAL = 1_000, 64  # items of a harness task and tokens of its answers, which a plan does not read
_LONGEST = 2  # rows of a typed micro-batch, and the longest of all, are as long as so many of the mean
_BETWEEN, _END = (
    0.015,
    0.5,
)  # of a process's start: between stages (checks of the base, the disk), and report and mirror
# Bytes that autograd saves of a token, for each layer and unit of width, in 16 bit: counted by benchmarks/host_cost.py. Checkpointing keeps the input.
_PER_LAYER, _INPUT = 33, 2


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one stage, from which rate, and what is assumed; `keys` are of the records that were measured."""

    seconds: float
    memory: float
    rate: str = ""
    assumed: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()


class Forecast:
    """The time, memory and cost of what is left of a plan; `later` are stages like those that will follow."""

    def __init__(
        self, cells: Sequence[Cell], store: Store, workers: int = 1, later: Iterable[Stage] = (), engines: int = 1
    ) -> None:
        self.cells, self.workers, self.engines = list(cells), workers, engines
        config = self.cells[0].config
        self.configs = {s.key: c.config for c in reversed(self.cells) for s in c.chain.stages}
        self.left = [s for s in plan.stages(self.cells) if not store.done(s)]
        self.later = [s for s in dict.fromkeys(later) if s.key not in self.configs and not store.done(s)]
        self.done = {s.key for s in plan.stages(self.cells) if store.done(s)}
        self.price = config.plan.price
        self.gpu = config.plan.gpu or gpu_here()
        self.measured: Measured = measured(store.outputs.root, self.gpu)
        self.device: Device = device(config, self.gpu)
        self._shapes: dict[str, Shape] = {}
        self._estimates: dict[str, Estimate] = {}  # by the stages' keys

    def lines(self) -> list[str]:
        """Return a line for each kind of stage that is left, and the whole; nothing if nothing is left."""
        if not self.left and not self.later:
            return []
        kinds = [(kind, [s for s in [*self.left, *self.later] if s.kind == kind]) for kind in VERSIONS]
        return [self._kind_line(kind, these) for kind, these in kinds if these] + [f"  about {self._total()}"]

    def _kind_line(self, kind: str, these: list[Stage]) -> str:
        estimates = [self.of(stage) for stage in these]
        seconds, on_gpu = sum(e.seconds for e in estimates), self.gpu and kind != ContaminationSpec.KIND
        amount = f"{seconds / 3600:.2f} GPU-hours" if on_gpu else span(seconds)
        peak = max(e.memory for e in estimates)
        memory = f", peak {peak / 1e9:.1f} GB" if peak else ""
        if self.device.memory and peak > self.device.memory:
            memory += f" (more than the {self.device.memory / 1e9:.0f} GB there are)"
        return f"  {kind:<13} {amount}{memory}: {_origin(estimates)}"

    def _total(self) -> str:
        text = span(self.seconds) + (f" with {self.workers} workers" if self.workers > 1 else "")
        if not self.gpu:
            return text
        hours = self.seconds * self.workers / 3600
        return f"{text}, {hours:.2f} GPU-hours" + (f", ${hours * self.price:,.2f}" if self.price else "")

    @property
    def seconds(self) -> float:
        """Return the time from the plan to the end of the report, with this many workers."""
        start = self.measured.start(self.workers) or self.device.start(self._weights(self.cells[0].config))
        between = _BETWEEN * start
        total = start + _END * start
        for batch in plan.batches(self.cells, self.done, self.engines):
            free = [0.0] * self.workers
            for job in batch:
                work = sum(self.of(s).seconds + between for s in job.stages)
                heapq.heapreplace(free, free[0] + work)
            total += max(free)
        return total + sum(self.of(s).seconds + between for s in self.later) / self.workers

    # --- a stage --------------------------------------------------------------------------------------------------

    def of(self, stage: Stage) -> Estimate:
        """Return the estimate of one stage: of records like it, or from its FLOP."""
        if stage.key not in self._estimates:
            self._estimates[stage.key] = self._estimate(stage)
        return self._estimates[stage.key]

    def _estimate(self, stage: Stage) -> Estimate:
        config = self.configs.get(stage.key, self.cells[0].config)
        work = _Work(stage, config, self._shape(config), self.device, self.measured)
        if pace := self.measured.pace(groups_of(stage)):
            return work.at(pace)
        return work.estimate

    def _shape(self, config: Config) -> Shape:
        name = config.model.model_dump_json()
        if name not in self._shapes:
            self._shapes[name] = sizes.shape_of(config)
        return self._shapes[name]

    def _weights(self, config: Config) -> float:
        return self._shape(config).parameters * _bytes(config)


@dataclass(frozen=True)
class _Work:
    """A stage's work: its size, and its time and memory on a device."""

    stage: Stage
    config: Config
    shape: Shape
    device: Device
    measured: Measured

    def at(self, pace: Pace) -> Estimate:
        """Return the estimate at the pace of records like this stage."""
        size, origin = self._size
        return Estimate(pace.seconds(size, self._theory), pace.memory_mb * 2**20, "", (origin,), pace.keys)

    @property
    def _size(self) -> tuple[float, str]:
        """Return the size in what a pace counts, and what of it is assumed."""
        spec = self.stage.spec
        if isinstance(spec, TrainingSpec):
            return self._tokens
        if isinstance(spec, EvaluateSpec):
            return self._items
        return 1.0, ""

    def _theory(self, size: float) -> float:
        """Return the seconds of a stage like this one of another size, from FLOP and rates."""
        spec = self.stage.spec
        if isinstance(spec, TrainingSpec):
            return _FIXED + self._training_seconds(spec, size)
        if isinstance(spec, FlipsSpec):
            return _FIXED_EVALUATION + sum(self._evaluation_seconds(size, batch) for batch in spec.batches)
        if isinstance(spec, EvaluateSpec):
            batch = _ENGINE_BATCH if spec.engine else self.config.recipe.eval_batch
            return _FIXED_EVALUATION + self._evaluation_seconds(size, batch)
        return _FIXED + self._preparation_seconds(spec) if isinstance(spec, PrepareSpec) else _CHECK

    @property
    def estimate(self) -> Estimate:
        """Return the estimate from FLOP and rates."""
        spec, shape = self.stage.spec, self.shape
        size, words = self._size
        seconds = self._theory(size)
        if not isinstance(spec, TrainingSpec | EvaluateSpec | PrepareSpec):
            return Estimate(seconds, 0, "assumed")
        beside = self._evaluation_bytes if isinstance(spec, EvaluateSpec) else 4 * 14 * shape.hidden**2
        beside = self._training_bytes(spec) if isinstance(spec, TrainingSpec) else beside
        prompts = self._prompt.origin if isinstance(spec, EvaluateSpec) else ""
        of_model = shape.assumed or f"{sizes.size_text(shape.parameters)} parameters"
        memory = self.device.process + shape.parameters * _bytes(self.config) + beside
        return Estimate(seconds, memory, f"from {self.device.label}", (of_model, words, prompts))

    # --- trainings ------------------------------------------------------------------------------------------------

    @cached_property
    def _row(self) -> Tokens:
        """Return the tokens of a row of the stage's own data: as records show, by its texts, or assumed."""
        spec, config = self.stage.spec, self.config
        if tokens := self.measured.tokens.get(row_group(self.stage.kind, spec.content())):
            return Tokens(tokens, "")
        if isinstance(spec, WarmupSpec):
            return self._general_row
        columns = set().union(*map(fields, _texts(config.task, config.method.needs_pairs)))
        return sizes.training_tokens(config, config.task.data, columns, config.recipe.max_length)

    @cached_property
    def _general_row(self) -> Tokens:
        warmup = self.config.warmup
        return sizes.training_tokens(self.config, warmup.data, [warmup.messages], self.config.recipe.max_length)

    @cached_property
    def _tokens(self) -> tuple[float, str]:
        """Return the tokens that a training sees, and what of it is assumed."""
        rows, words = self._rows
        general = self._general_samples
        tokens = max(rows - general, 0) * self._row.count
        if general:  # the warm-up's data of a cell without one need not be there
            tokens += general * self._general_row.count
        return tokens, _joined(words, self._row.origin)

    @cached_property
    def _rows(self) -> tuple[float, str]:
        """Return rows x epochs, and what of it is assumed."""
        spec = self.stage.spec
        assert isinstance(spec, TrainingSpec)
        if self.stage.samples is not None:
            return self.stage.samples, ""
        source = self.config.warmup.data if isinstance(spec, WarmupSpec) else self.config.task.data
        known = sizes.trained_rows(self.config, source)
        return known.count * spec.epochs, known.origin

    @property
    def _general_samples(self) -> float:
        """Return how many samples of a control arm without a warm-up account for the one that it does not have."""
        control = self.stage.spec.control if isinstance(self.stage.spec, AdaptSpec) else None
        return control["m"] * control["epochs"] if control and control["m"] != "all" else 0

    def _training_seconds(self, spec: TrainingSpec, tokens: float) -> float:
        method = spec.method
        passes = 4 + 2 * method.extra_forwards + (2 / method.epochs if isinstance(method, Referenced) else 0)
        shape, device = self.shape, self.device
        seconds = passes * tokens * (shape.parameters / device.flops + shape.layers * shape.hidden * device.width / 4)
        rows = tokens / self._row.count
        return seconds + device.step * shape.layers * rows / max(1, self._pass_tokens(spec) / self._row.count)

    def _training_bytes(self, spec: TrainingSpec) -> float:
        """Return the weights, the adapter with its gradient and Adam's two moments in float32, and activations."""
        shape, recipe = self.shape, self.config.recipe
        adapter = 16 * 2 * spec.lora.r * shape.hidden * 7 * shape.layers * 2
        saved = shape.layers * _PER_LAYER
        if recipe.gradient_checkpointing:
            saved = _PER_LAYER + shape.layers * _INPUT  # one layer at a time is computed again
        token = saved * shape.hidden * _bytes(self.config) / 2
        tokens, row = self._pass_tokens(spec), min(_LONGEST * self._row.count, spec.max_length)
        if recipe.micro_batch != "auto":
            return adapter + recipe.micro_batch * row * token
        if self.device.memory:  # passes are halved until they fit, but none is smaller than a row
            room = self.device.memory - self.device.process - shape.parameters * _bytes(self.config) - adapter
            while tokens > row and tokens * token > room:
                tokens /= 2
        return adapter + max(tokens, row) * token

    def _pass_tokens(self, spec: TrainingSpec) -> float:
        """Return the tokens of a pass, by the mean length of a row."""
        recipe = self.config.recipe
        if recipe.micro_batch != "auto":
            return recipe.micro_batch * self._row.count
        return min(PASS_TOKENS["cuda" if self.device.gpu else "cpu"], spec.batch * self._row.count)

    def _preparation_seconds(self, spec: PrepareSpec) -> float:
        """Return the seconds of forward and backward passes over its rows, and of a decomposition a layer's matrix."""
        shape, tokens = self.shape, spec.rows.get("samples", 0) * self.config.recipe.max_length / 4
        decompositions = 7 * shape.layers * 14 * shape.hidden**3
        return 4 * shape.parameters * tokens / self.device.flops + decompositions / self.device.svd

    # --- evaluations ----------------------------------------------------------------------------------------------

    @cached_property
    def _benchmark(self) -> Benchmark | None:
        return self.config.benchmarks.get(self.stage.subject)

    @cached_property
    def _items(self) -> tuple[float, str]:
        """Return the items of an evaluation, and what of it is assumed."""
        if self._benchmark is None:
            return _LM_EVAL[0], f"{_LM_EVAL[0]:,} items assumed"
        known = sizes.items_of(self.config, self._benchmark)
        limit = self.stage.spec.items if isinstance(self.stage.spec, FlipsSpec) else None
        items = known if known is not None else _LM_EVAL[0]
        return min(items, limit or items), "" if known is not None else f"{items:,} items assumed"

    @cached_property
    def _prompt(self) -> Tokens:
        return sizes.prompt_tokens(self.config, self._benchmark) if self._benchmark else Tokens(sizes.PROMPT, "")

    @property
    def _generates(self) -> bool:
        return self._benchmark is None or self._benchmark.scoring.generates

    @property
    def _chooses(self) -> bool:
        return self._benchmark is not None and isinstance(self._benchmark.scoring, MultipleChoice)

    @property
    def _answer(self) -> int:
        """Return the tokens after which a batch ends: with its longest answer."""
        return self._benchmark.max_new_tokens if self._benchmark else _LM_EVAL[1]

    def _evaluation_seconds(self, items: float, batch: int) -> float:
        shape = self.shape
        requests = items * _CHOICES if self._chooses else items
        passes = -(-requests // batch)
        seconds = requests * self._prompt.count * 2 * shape.parameters / self.device.flops
        if not self._generates:
            return seconds + passes * self.device.token * shape.layers
        seconds += requests * self._answer * 2 * shape.parameters / self.device.flops
        return seconds + passes * self._answer * self.device.decode(shape, shape.parameters * _bytes(self.config))

    @property
    def _evaluation_bytes(self) -> float:
        """Return the cache of keys and values of a batch; of choices their logits, and log-softmax in float32."""
        shape, batch, prompt = self.shape, self.config.recipe.eval_batch, self._prompt.count
        if not self._generates:
            return batch * prompt * shape.vocabulary * 8
        return batch * (prompt + self._answer) * shape.layers * shape.kv * 2 * _bytes(self.config)


def _texts(task: Task, pairs: bool) -> list[str]:
    """Return the templates of what a training reads of a row."""
    whole = task.continuation == "rest"
    chosen, rejected = (task.full_chosen, task.full_rejected) if whole else (task.chosen, task.rejected)
    prompt = [task.prompt] if isinstance(task.prompt, str) else [turn.content for turn in task.prompt or []]
    return [t for t in (*prompt, task.prefix, chosen or task.chosen, (rejected or task.rejected) if pairs else "") if t]


def _bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _joined(*words: str) -> str:
    return ", ".join(filter(None, words))


def _origin(estimates: Sequence[Estimate]) -> str:
    """Say how the estimates of one kind are known: on how many records, or from which rates, and what is assumed."""
    measured_ones = [e for e in estimates if e.keys]
    computed = [e for e in estimates if not e.keys]
    keys = frozenset[str]().union(*(e.keys for e in measured_ones))
    parts = []
    if keys:
        parts.append(_joined(f"measured here on {len(keys)} record{'s'[: len(keys) != 1]}", *_assumed(measured_ones)))
    if computed:
        share = f"{len(computed)} of {len(estimates)} " if keys else ""
        parts.append(_joined(*dict.fromkeys(f"{share}{e.rate}" for e in computed), *_assumed(computed)))
    return "; ".join(parts)


def _assumed(estimates: Iterable[Estimate]) -> list[str]:
    return list(dict.fromkeys(words for e in estimates for words in e.assumed if words))


def span(seconds: float) -> str:
    """Return seconds as people say them: 45 s, 12 min, 5.3 h."""
    if seconds <= 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds <= 90 * 60 else f"{seconds / 3600:.1f} h"
