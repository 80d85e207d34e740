"""Define the configuration of one cell, checked before any data or model is loaded."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, ValidationError, model_validator

from d2lora.errors import UserError
from d2lora.scoring import Unit
from d2lora.scoring.kinds import BITS, PERCENT
from d2lora.settings.controls import CONTROL_NAMES, Control, NoControl, control_of, in_effect
from d2lora.settings.gpus import Planning
from d2lora.settings.inits import INIT_NAMES, Init, init_of
from d2lora.settings.methods import METHOD_NAMES, Method, method_of
from d2lora.settings.recipe import ALL_LINEAR, RATE, Recipe
from d2lora.settings.tasks import Benchmark, Model, Task, Warmup
from d2lora.settings.values import Amount, PathText, Seed, Strict, Text, as_given

OF_VALIDATION = "_validation"  # ends the name of the validation benchmark of another
_WITHOUT_PAIRS = " or ".join(f"method={name}" for name in METHOD_NAMES if not method_of(name).needs_pairs)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _file_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", value):
        raise ValueError("letters, digits, _, . and -, a letter or digit first")
    return value


Texts = Annotated[list[Text], BeforeValidator(_listed)]  # one text may be typed without brackets


class Wandb(Strict):
    """Settings of the mirror in W&B. None of them changes a result, so they are in no key and no manifest."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with credentials, offline without
    project: Text | None = None  # WANDB_PROJECT, or d2lora
    entity: Text | None = None  # WANDB_ENTITY, or the account's own
    group: Text | None = None  # WANDB_RUN_GROUP, or the sweep
    tags: Annotated[list[Annotated[Text, Field(max_length=64)]], BeforeValidator(_listed)] = Field(default=[])
    notes: Text | None = None  # WANDB_NOTES
    artifacts: StrictBool = True  # adapters, with their lineage
    patience: Annotated[float, Field(gt=0)] = 60  # seconds that a job waits for the server before it goes on without


class Report(Strict):
    """Settings of a sweep's tables. None of them changes a result, so they are in no key."""

    # The setting of the columns and the x axis, by its key; without it the one with the most values.
    columns: Text | None = None
    # Within which two arms are called equivalent: points, and of a benchmark of kind likelihood hundredths of a bit per byte.
    margin: Annotated[float, Field(gt=0)] = PERCENT.margin
    likelihood_margin: Annotated[float, Field(gt=0)] = BITS.margin

    def margin_of(self, unit: Unit) -> float:
        """Return the margin of scores in this unit, in the unit."""
        return getattr(self, unit.margin_setting)


class Config(Strict):
    """One cell of the grid: D2LoRA(m, n) of one task, method, init, recipe and seed."""

    model: Model
    task: Task
    method: Method
    init: Init
    warmup: Warmup
    recipe: Recipe
    control: Control = NoControl()
    n: Amount
    m: Amount
    replicate: Seed = 0  # what conf gives seed and data_seed: another draw and another training
    seed: Seed = 0  # initialization, order, dropout
    data_seed: Seed = 0  # which n and m rows
    split_seed: Seed = 0  # hold-outs
    tune: Texts = Field(default=[])  # keys whose values a sweep chooses on validation benchmarks, arm by arm
    objective: Texts = Field(default=[], exclude=True)  # what a sweeper optimizes: BENCHMARK/METRIC
    sweep: Annotated[Text, AfterValidator(_file_name)] = "adhoc"  # names a file and a folder
    output: PathText = "outputs"
    report: Report = Report()
    plan: Planning = Field(default=Planning(), exclude=True)
    wandb: Wandb = Field(default=Wandb(), exclude=True)
    data_root: Text | None = None
    dry_run: StrictBool = False
    skip_invalid: StrictBool = False
    job: list[Text] | None = None  # keys of the stages that this process is to do; set by the grid sweeper

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """Return the task's benchmarks, and where settings are chosen by them its validation benchmarks."""
        return self.task.benchmark | (self.task.validation if self.is_validated else {})

    @property
    def objectives(self) -> list[tuple[str, str]]:
        """Return benchmark and metric of each objective: the validation benchmark of the one that is named, if it has one."""
        pairs = [(name, metric) for name, _, metric in (text.rpartition("/") for text in self.objective)]
        return [
            (f"{name}{OF_VALIDATION}" if f"{name}{OF_VALIDATION}" in self.task.validation else name, metric)
            for name, metric in pairs
        ]

    @property
    def is_validated(self) -> bool:
        """Tell whether the cell is evaluated on validation benchmarks: to choose settings by them."""
        return bool(self.tune) or any(name in self.task.validation for name, _ in self.objectives)

    @model_validator(mode="after")
    def _objective_is_measured(self) -> "Config":
        known = [*self.task.validation, *self.task.benchmark, *(task.name for task in self.task.harness_tasks)]
        for text, (name, metric) in zip(self.objective, self.objectives, strict=True):
            if name not in known or not metric:
                raise ValueError(
                    f"objective={text}: BENCHMARK/METRIC, with a benchmark of {', '.join(known) or 'none'}"
                )
            benchmark = (self.task.validation | self.task.benchmark).get(name)
            if benchmark and metric not in benchmark.scoring.metrics:
                raise ValueError(f"objective={text}: {name} has {', '.join(benchmark.scoring.metrics)}")
        return self

    @model_validator(mode="after")
    def _data_root_where_needed(self) -> "Config":
        read = [b.data for b in self.benchmarks.values()]
        read += [self.task.data] * (self.n != 0)
        read += [self.warmup.data] * (self.m != 0 or self.init.looks_at == "general")
        if self.data_root is None and any(source.path.startswith("None/") for source in read):
            raise ValueError(
                "data_root=null: name the folder that holds your local data sets, for example data_root=$HOME/data"
            )
        return self

    @model_validator(mode="after")
    def _rows_suffice(self) -> "Config":
        if self.n != "all" and 0 < self.n < self.method.least_rows:
            raise ValueError(f"n={self.n}: method={self.method.name} needs {self.method.least_rows} rows or more, or 0")
        return self

    @property
    def effective_control(self) -> Control:
        """Return the control arm that the cell is of; NoControl where there is nothing to control for (m = 0)."""
        return self.control if in_effect(self.control.name, self.m, self.n) == self.control.name else NoControl()

    @model_validator(mode="after")
    def _control_can_be_trained(self) -> "Config":
        control = self.effective_control
        name = f"control={control.name}"
        if self.method.needs_pairs and not control.takes_pairs:
            raise ValueError(f"{name}: needs {_WITHOUT_PAIRS}, as general rows have no rejected answers")
        if self.warmup.rendered and not control.takes_texts:
            raise ValueError(f"{name}: needs conversations, and with warmup.rendered=true rows are texts")
        if control.adds_up and not self.init.adds_up:
            raise ValueError(f"{name}: with init={self.init.name} two adapters have no sum that is one")
        return self

    @model_validator(mode="after")
    def _columns_are_a_setting(self) -> "Config":
        columns = self.report.columns
        part, _, inner = (columns or "n").partition(".")
        if part not in type(self).model_fields or part in (
            *("report", "plan", "wandb", "output", "sweep", "seed", "replicate", "tune"),
        ):
            raise ValueError(
                f"report.columns={columns}: n, m, model, init, warmup, or a setting's key, for example recipe.lr"
            )
        if inner and not _has_key(self.model_dump(), columns or ""):
            raise ValueError(f"report.columns={columns}: there is no such key; --cfg job shows all")
        return self

    @model_validator(mode="after")
    def _tuned_keys_are_settings(self) -> "Config":
        for key in self.tune:
            part, _, inner = key.partition(".")
            if key in (f"{RATE}_factor", *(f"{RATE}.{name}" for name in METHOD_NAMES)):
                raise ValueError(f"tune={key}: {RATE} is meant, the rate of each cell's own method")
            if part not in ("method", "init", "recipe", "warmup") or not inner:
                raise ValueError(f"tune={key}: the key of a setting, for example {RATE} or method.beta")
            # Those of a method or an initialization may be another cell's: the sweep knows.
            if part in ("recipe", "warmup") and not _has_key(self.model_dump(), key):
                raise ValueError(f"tune={key}: there is no such key; --cfg job shows all")
            if not self.task.validation:
                raise ValueError(
                    f"tune={key}: task={self.task.name} names no validation benchmark to choose on (task.validation, docs/tuning.md)"
                )
        return self

    @model_validator(mode="after")
    def _recipe_fits_the_init(self) -> "Config":
        lora, init = self.recipe.lora, self.init
        if lora.dropout and not init.allows_dropout:
            raise ValueError(
                f"recipe.lora.dropout={lora.dropout}: must be 0 with init={init.name}: it would drop parts of the base itself"
            )
        if lora.r % init.rank_multiple:
            raise ValueError(
                f"recipe.lora.r={lora.r}: must be a multiple of {init.rank_multiple} with init={init.name}"
            )
        if init.looks_at == "task" and self.n == 0 and self.m != 0:
            raise ValueError("init.data=task: n=0 leaves no task rows to look at: use init.data=general")
        if init.quantizes and self.method.base_is_reference:
            raise ValueError(
                f"method.reference=base: with init={init.name} the base is a quantized one: use warm_start"
            )
        if init.quantizes and lora.target_modules != ALL_LINEAR:  # other layers would stay as they are
            raise ValueError(
                f"recipe.lora.target_modules={lora.target_modules}: must be all-linear with init={init.name}: "
                "a base loaded in 4 bits has all its linear layers quantized"
            )
        return self

    @model_validator(mode="after")
    def _pairs_where_needed(self) -> "Config":
        if self.method.needs_pairs and self.task.rejected is None:
            raise ValueError(
                f"method={self.method.name} needs rejected answers and task={self.task.name} has none: use {_WITHOUT_PAIRS}"
            )
        return self


def _has_key(values: Mapping[str, Any], key: str) -> bool:
    """Tell whether nested mappings have a dotted key."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def parse(values: dict[str, Any]) -> Config:
    """Return the checked Config of a resolved mapping. UserError with one line for each problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_line(problem) for problem in error.errors())) from None


# The settings that are one of several classes, by name: each name's class.
_CLASSES: dict[str, dict[str, type[BaseModel]]] = {
    "method": {name: method_of(name) for name in METHOD_NAMES},
    "init": {name: init_of(name) for name in INIT_NAMES},
    "control": {name: control_of(name) for name in CONTROL_NAMES},
}


def _line(problem: Any) -> str:
    """Return one of pydantic's problems as key=value and what is allowed."""
    loc, choice, allowed = problem["loc"], "", ""
    classes = _CLASSES.get(loc[0], {}) if loc else {}
    if len(loc) > 1 and loc[1] in classes:  # pydantic names the class that was meant between a setting and its fields
        choice, loc = loc[1], (loc[0], *loc[2:])
        others = [name for name in classes[choice].model_fields if name != "name"]
        allowed = f" with {loc[0]}={choice}, which takes {', '.join(others) or 'no settings'}"
    key = ".".join(
        str(part)
        for part in loc
        if not str(part).startswith(("literal", "constrained-", "prompt-", "harness-", "[key]"))
    )
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key{allowed}"
    if problem["type"] == "missing":
        return f"{key}: missing{allowed}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.name: missing"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.name={problem['ctx']['tag']}: one of {', '.join(classes)}"
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return f"{key}={as_given(problem['input'])}: a group of settings, not one: {key}.NAME=VALUE, with the names that --cfg job shows"
    if isinstance(problem["input"], BaseModel | dict):
        return f"{key}: {text}" if key else text
    return f"{key}={as_given(problem['input'])}: {text[0].lower() + text[1:]}"
