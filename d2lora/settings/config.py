"""The typed configuration of one cell. Everything is checked here, before any data or model is loaded."""

import math
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    model_validator,
)

from d2lora.errors import UserError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _amount(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 0):
        return value
    raise ValueError("a whole number from 0 on, or all")


def _template(value: Any) -> Any:
    """A text with {column} fields; refused when it is not one, so that a typing error shows before the data is read."""
    if isinstance(value, str):
        try:
            fields(value)
        except ValueError as error:
            raise ValueError(f"a text with {{column}} fields ({error}; write {{{{ and }}}} for braces)") from error
    return value


def fields(template: str) -> set[str]:
    """The columns a template names: "{question} {choices[text]}" -> {"question", "choices"}."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    if "" in names:
        raise ValueError("a field without a name")
    for name in sorted(names):
        if "." in re.sub(r"\[[^\]]*\]", "", name):
            meant = re.sub(r"\.(\w+)", r"[\1]", name)
            raise ValueError(f"{{{name}}} names an attribute: {{{meant}}} is meant")
    return {name.split("[")[0].split(".")[0] for name in names}


def _text(value: str) -> str:
    """A text that files and keys can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in UTF-8") from None
    if "\0" in value:
        raise ValueError("a text without null bytes")
    return value


def _home(value: str) -> str:
    """A path whose ~name is somebody's home."""
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return value


def _plain(value: Any) -> Any:
    """A value that a column of rows may have."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError("a text, a number, true or false")


Text = Annotated[StrictStr, AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(_home)]
Amount = Annotated[StrictInt | Literal["all"], BeforeValidator(_amount)]
Template = Annotated[Text, BeforeValidator(_template)]
Value = Annotated[Any, BeforeValidator(_plain)]
Positive = Annotated[StrictInt, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]


class Data(_Strict):
    """Rows: a data set on the Hub (name and revision) or local files (a folder with <split>.jsonl and the like, or a file)."""

    path: PathText
    name: Text | None = None  # the Hub's configuration; of a local folder, a folder in it
    file: Text | None = None  # one file of the data set, where it has no splits
    split: Text = "train"
    revision: Text | None = None
    where: dict[Text, list[Value]] = {}  # column -> values to keep
    hold_out: Annotated[StrictInt, Field(ge=0)] = 0  # rows set aside by split_seed before anything else
    part: Literal["rest", "held_out"] = "rest"
    empty: Literal["refuse", "leave_out"] = "refuse"  # rows with nothing where a text should be

    @model_validator(mode="after")
    def _held_out_of_something(self) -> "Data":
        if self.part == "held_out" and not self.hold_out:
            raise ValueError("part=held_out needs hold_out, the number of rows that are set aside")
        return self


class Model(_Strict):
    name: Text
    path: PathText  # a Hub name or a local folder
    revision: Text | None = None
    # An installed package that carries the weights as GGUF; a name with dots would import its parent.
    gguf_package: Annotated[Text, Field(pattern=r"^\w+$")] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: StrictBool = False
    thinking: StrictBool = False  # whether it thinks before it answers, where its chat template leaves that open


class Benchmark(_Strict):
    """One test: rows, a prompt, and how an answer is scored."""

    data: Data
    kind: Literal["number", "exact", "rouge", "choice"]
    prompt: Template
    gold: Template  # the reference answer, or a column with a list of them; choice: the label of the right choice
    choices: Text | None = None  # choice: dotted path of the list of texts, and of their labels
    labels: Text | None = None
    chat: StrictBool = True
    max_new_tokens: Positive = 512
    limit: Positive | None = None  # the first rows only

    @model_validator(mode="after")
    def _choice_has_choices(self) -> "Benchmark":
        if self.kind == "choice" and not (self.choices and self.labels):
            raise ValueError("kind choice needs choices and labels, the paths of two lists")
        return self


class Turn(_Strict):
    """A turn of a prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Template


# Tagged, so that an error is about the form that was meant.
Prompt = Annotated[
    Annotated[Template, Tag("prompt-text")] | Annotated[list[Turn], Field(min_length=1), Tag("prompt-turns")],
    Discriminator(lambda value: "prompt-turns" if isinstance(value, list) else "prompt-text"),
]


class Task(_Strict):
    """Phase 2: what to adapt to, and the benchmarks that judge it."""

    name: Text
    data: Data
    # A text, or turns (a system turn, history); null where the answers' columns hold conversations with the prompt in them.
    prompt: Prompt | None
    prefix: Template = ""  # the start of the assistant's turn that is given, e.g. the steps before the fork of a pair
    chosen: Template
    rejected: Template | None = None
    full_chosen: Template | None = None  # the whole remaining answer, where chosen is only its next step
    full_rejected: Template | None = None
    continuation: Literal["step", "rest"] = "step"
    rendered: StrictBool = False  # rows carry the model's own tokens already: no template is applied
    benchmark: dict[Text, Benchmark] = {}
    lm_eval: list[Text] = []  # names of lm-evaluation-harness's own tasks

    @property
    def templates(self) -> list[str]:
        """All templates of columns."""
        prompt = [self.prompt] if isinstance(self.prompt, str) else [turn.content for turn in self.prompt or []]
        answers = (self.prefix, self.chosen, self.rejected, self.full_chosen, self.full_rejected)
        return [*prompt, *filter(None, answers)]


class Method(_Strict):
    name: Literal["sft", "dpo", "orpo"]
    epochs: Positive
    beta: Annotated[float, Field(gt=0)] | None = None
    reference: Literal["warm_start", "base"] | None = None
    nll: Literal["prompt_and_chosen", "completion"] | None = None

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> "Method":
        wanted = {"sft": set(), "dpo": {"beta", "reference"}, "orpo": {"beta", "nll"}}[self.name]
        given = {key for key in ("beta", "reference", "nll") if getattr(self, key) is not None}
        if wanted != given:
            raise ValueError(f"{self.name} takes {', '.join(sorted(wanted)) or 'none'} of beta, reference, nll")
        return self


# What each initialization is told beside its name.
_INIT_SETTINGS: dict[str, set[str]] = {
    "corda_kpm": {"data", "samples"},
    "corda_ipm": {"data", "samples"},
    "eva": {"data", "samples", "rho"},
    "lora_ga": {"data", "samples", "direction", "gamma"},
    "multilora": {"modules"},
}


# Those whose base is a quantized one, with or without training: they have a base of their own to compare with.
QUANTIZING = {"loftq"}


class Init(_Strict):
    """How A and B begin (docs/inits.md). `data` is what a preparation looks at: the warm-up's rows, or the cell's own n."""

    name: Literal[
        "lora", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "milora", "corda_kpm", "corda_ipm",
        "eva", "lora_ga", "loftq", "multilora",
    ]  # fmt: skip
    data: Literal["general", "task"] | None = None
    samples: Positive | None = None  # rows of it at most
    rho: Annotated[float, Field(ge=1)] | None = None  # EVA: a layer's rank is at most rho * r
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] | None = None  # LoRA-GA: which singular vectors A and B take
    gamma: Positive | None = None  # LoRA-GA: the larger, the smaller A and B
    modules: Positive | None = None  # MultiLoRA: parallel modules, of rank r / modules each

    @model_validator(mode="after")
    def _settings_of_the_init(self) -> "Init":
        wanted = _INIT_SETTINGS.get(self.name, set())
        given = {key for key in set().union(*_INIT_SETTINGS.values()) if getattr(self, key) is not None}
        if wanted != given:
            raise ValueError(
                f"{self.name} takes {', '.join(sorted(wanted)) or 'no settings'}, not {', '.join(sorted(given)) or 'none'}"
            )
        return self

    @property
    def prepared(self) -> bool:
        """Whether A and B are computed, from the base's weights or from data, by a stage of its own."""
        return self.name not in ("lora", "gaussian", "orthogonal", "multilora")

    @property
    def random(self) -> bool:
        """Whether the preparation draws random numbers."""
        return self.name in ("pissa_niter_16", "lora_ga")


class Warmup(_Strict):
    """Phase 1: general data in conversations; the loss is on every assistant turn."""

    name: Text
    data: Data
    messages: Text = "chosen"  # the column that holds a conversation
    tools: Text = "tools"  # the column that holds the tools it may use, where rows have one
    rendered: StrictBool = False  # the column holds texts that a chat template has made already
    epochs: Positive = 1


class Lora(_Strict):
    r: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Text | list[Text] = "all-linear"


class Rates(_Strict):
    warmup: Rate
    sft: Rate
    dpo: Rate
    orpo: Rate


class Epochs(_Strict):
    warmup: Positive
    sft: Positive
    dpo: Positive
    orpo: Positive


class Recipe(_Strict):
    """How both phases are trained, and on what part of the machine."""

    name: Text
    lora: Lora
    lr: Rates
    epochs: Epochs  # what the method and warmup groups take theirs from
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch: Positive
    max_length: Positive
    # From here on nothing changes a result beyond rounding, so nothing of it is part of a key (with dropout, the first three are).
    micro_batch: Positive
    packing: Literal["prefix_shared", "padded"] = "prefix_shared"
    attention: Literal["sdpa", "flex_attention"] = "sdpa"  # eager would add a packed batch's mask, not apply it
    eval_batch: Positive = 16
    gradient_checkpointing: StrictBool = False
    threads: Positive | None = None
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0

    @model_validator(mode="after")
    def _micro_batch_divides_batch(self) -> "Recipe":
        if self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} must be a multiple of micro_batch={self.micro_batch}")
        return self


class Wandb(_Strict):
    """Where W&B mirrors the records. Nothing of it changes a result, so nothing of it is in a key or a manifest."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with credentials, offline without
    project: Text | None = None  # WANDB_PROJECT, or d2lora
    entity: Text | None = None  # WANDB_ENTITY, or the account's own
    artifacts: StrictBool = True  # adapters, with their lineage
    patience: Annotated[float, Field(gt=0)] = 60  # seconds that a job waits for the server before it goes on without


class Config(_Strict):
    """One cell of the grid: D2LoRA(m, n) of one task, method, init, recipe and seed."""

    model: Model
    task: Task
    method: Method
    init: Init
    warmup: Warmup
    recipe: Recipe
    n: Amount
    m: Amount
    seed: Seed = 0  # initialization, order, dropout
    data_seed: Seed = 0  # which n and m rows
    split_seed: Seed = 0  # hold-outs
    sweep: Annotated[Text, Field(pattern=r"^\w[\w.-]*$")] = "adhoc"  # names a file and a folder
    output: PathText = "outputs"
    wandb: Wandb = Field(default=Wandb(), exclude=True)
    data_root: Text | None = None
    dry_run: StrictBool = False
    skip_invalid: StrictBool = False
    job: list[Text] | None = None  # keys of the stages that this process is to do; set by the grid sweeper

    @model_validator(mode="after")
    def _data_root_where_needed(self) -> "Config":
        read = [b.data for b in self.task.benchmark.values()]
        read += [self.task.data] * (self.n != 0)
        read += [self.warmup.data] * (self.m != 0 or self.init.data == "general")
        if self.data_root is None and any(source.path.startswith("None/") for source in read):
            raise ValueError(
                "data_root=null: name the folder that holds your local data sets, for example data_root=$HOME/data"
            )
        return self

    @model_validator(mode="after")
    def _recipe_fits_the_init(self) -> "Config":
        lora, name = self.recipe.lora, self.init.name
        if lora.dropout and self.init.prepared and name != "eva":
            raise ValueError(
                f"recipe.lora.dropout={lora.dropout}: must be 0 with init={name}: it would drop parts of the base itself"
            )
        parts = {"orthogonal": 2, "multilora": self.init.modules or 1}.get(name, 1)
        if lora.r % parts:
            raise ValueError(f"recipe.lora.r={lora.r}: must be a multiple of {parts} with init={name}")
        if self.init.data == "task" and self.n == 0 and self.m != 0:
            raise ValueError("init.data=task: n=0 leaves no task rows to look at: use init.data=general")
        if name in QUANTIZING and self.method.reference == "base":
            raise ValueError(f"method.reference=base: with init={name} the base is a quantized one: use warm_start")
        if name in QUANTIZING and lora.target_modules != "all-linear":  # other layers would stay as they are
            raise ValueError(
                f"recipe.lora.target_modules={lora.target_modules}: must be all-linear with init={name}: "
                "a base loaded in 4 bits has all its linear layers quantized"
            )
        return self

    @model_validator(mode="after")
    def _pairs_where_needed(self) -> "Config":
        if self.method.name != "sft" and self.task.rejected is None:
            raise ValueError(
                f"method={self.method.name} needs rejected answers and task={self.task.name} has none: use method=sft"
            )
        return self


def parse(values: dict) -> Config:
    """The checked Config of a resolved mapping; UserError with one line a problem otherwise."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_line(problem) for problem in error.errors())) from None


def _line(problem: Any) -> str:
    key = ".".join(
        str(part) for part in problem["loc"] if not str(part).startswith(("literal", "constrained-", "prompt-"))
    )
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    if problem["type"] == "missing":
        return f"{key}: missing"
    if isinstance(problem["input"], BaseModel | dict):
        return f"{key}: {text}" if key else text
    return f"{key}={problem['input']}: {text[0].lower() + text[1:]}"
