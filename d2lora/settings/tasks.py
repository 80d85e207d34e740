"""Define data sets, the base model, benchmarks, the task of phase 2 and the warm-up of phase 1."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StrictBool, StrictInt, Tag, model_validator

from d2lora.scoring import KINDS, Kind, kind_named
from d2lora.settings.values import PathText, Positive, Strict, Template, Text, Value


class Data(Strict):
    """A data set: on the Hub (name and revision), a local folder with <split>.jsonl and the like, or a local file."""

    path: PathText
    name: Text | None = None  # the Hub's configuration; of a local folder, a folder in it
    file: Text | None = None  # one file of the data set, where it has no splits
    split: Text = "train"
    revision: Text | None = None
    where: dict[Text, list[Value]] = Field(default={})  # column -> values to keep
    hold_out: Annotated[StrictInt, Field(ge=0)] = 0  # rows set aside by split_seed before anything else
    validation: Annotated[StrictInt, Field(ge=0)] = 0  # rows set aside beside those, to choose settings on
    part: Literal["rest", "held_out", "validation"] = "rest"
    empty: Literal["refuse", "leave_out"] = "refuse"  # rows with nothing where a text should be

    @model_validator(mode="after")
    def _held_out_of_something(self) -> "Data":
        if self.part == "held_out" and not self.hold_out:
            raise ValueError("part=held_out needs hold_out, the number of rows that are set aside")
        if self.part == "validation" and not self.validation:
            raise ValueError("part=validation needs validation, the number of rows that are set aside")
        return self


class Model(Strict):
    name: Text
    path: PathText  # a Hub name or a local folder
    revision: Text | None = None
    # An installed package that carries the weights as GGUF; a name with dots would import its parent.
    gguf_package: Annotated[Text, Field(pattern=r"^\w+$")] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: StrictBool = False
    thinking: StrictBool = False  # whether it thinks before it answers, if its chat template has a switch for that


def _kind_name(value: Any) -> Any:
    """Validate a benchmark kind; an error lists all kinds."""
    *others, last = [repr(kind.name) for kind in KINDS]
    if value not in [kind.name for kind in KINDS]:
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return value


class Turn(Strict):
    """A turn of a prompt."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Template


# Tagged, so that pydantic reports errors of the form that was used, and not of both.
Prompt = Annotated[
    Annotated[Template, Tag("prompt-text")] | Annotated[list[Turn], Field(min_length=1), Tag("prompt-turns")],
    Discriminator(lambda value: "prompt-turns" if isinstance(value, list) else "prompt-text"),
]


class HarnessTask(Strict):
    """A task of lm-evaluation-harness, with the settings that differ from the harness's own."""

    name: Text
    fewshot: Annotated[StrictInt, Field(ge=0)] | None = None  # examples before each question; null: as the task has it
    chat: StrictBool = False  # questions, and examples as turns before them, in the base's chat template
    limit: Positive | None = None  # the first items only
    filter: Text | None = None  # which of the ways in which the task reads an answer counts; null: its first

    def changed(self) -> dict[str, Any]:
        """Return the settings that are not at their defaults, without the name."""
        return self.model_dump(exclude={"name"}, exclude_defaults=True)


# Tagged, so that pydantic reports errors of the form that was used.
HarnessName = Annotated[
    Annotated[Text, Tag("harness-name")] | Annotated[HarnessTask, Tag("harness-settings")],
    Discriminator(lambda value: "harness-name" if isinstance(value, str) else "harness-settings"),
]


def _prompt_texts(prompt: str | list[Turn] | None) -> list[str]:
    """Return a prompt's templates: its text, or one for each of its turns."""
    return [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt or []]


def _option(value: Any) -> Any:
    """Validate a choice: a text with {column} fields, or a number as its text."""
    if isinstance(value, bool):
        raise ValueError('a text or a number: YAML reads yes, no, true and false as truth values: write "yes"')
    return str(value) if isinstance(value, int | float) else value


Option = Annotated[Template, BeforeValidator(_option)]

# Tagged, so that pydantic reports errors of the form that was used, and not of both.
_is_list = Discriminator(lambda value: "prompt-list" if isinstance(value, list) else "prompt-path")
Choices = Annotated[
    Annotated[Text, Tag("prompt-path")] | Annotated[list[Option], Field(min_length=2), Tag("prompt-list")], _is_list
]
Labels = Annotated[
    Annotated[Text, Tag("prompt-path")] | Annotated[list[Value], Field(min_length=2), Tag("prompt-list")], _is_list
]


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return value


Pattern = Annotated[Text, AfterValidator(_pattern)]


class Benchmark(Strict):
    """A test: rows, a prompt, and how an answer is scored."""

    data: Data
    kind: Annotated[str, BeforeValidator(_kind_name)]
    prompt: Prompt  # a text, or turns; "{column}" of a column with conversations
    gold: Template  # the reference answer, or a column with a list of them; choice: the label of the right choice
    # choice: the dotted path of a row's list of texts, or texts that are the same for all rows or filled with their columns.
    choices: Choices | None = None
    # choice: what the gold names them by: such a path, or values; null: the choices themselves.
    labels: Labels | None = None
    chat: StrictBool = True
    max_new_tokens: Positive = 512
    limit: Positive | None = None  # the first rows only
    # The column that says which rows belong together, as those of one passage or template: they are not independent.
    cluster: Text | None = None
    # What differs between items of one template (numbers, names), as a pattern: items whose prompts are equal but for it belong
    # together too. The report reads it, so it is in no key.
    varies: Pattern | None = None
    script: Literal["latin", "any"] = "latin"  # rouge: which letters words are made of
    too_long: Literal["refuse", "leave_out"] = "refuse"  # items that the model can't take

    def content(self) -> dict[str, Any]:
        """Return the benchmark's part of a key, without its data; settings that came later are in it only where they are set."""
        later = {"cluster", "script", "too_long"}
        unset = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(exclude={"data", "varies"} | unset)

    @property
    def scoring(self) -> Kind:
        """Return how answers are scored, by `kind`."""
        return kind_named(self.kind, self.script)

    @property
    def prompts(self) -> list[str]:
        """Return the prompt's templates: its text, or one for each of its turns."""
        return _prompt_texts(self.prompt)

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> "Benchmark":
        if missing := [name for name in self.scoring.needs if not getattr(self, name)]:
            raise ValueError(f"kind {self.kind} needs {' and '.join(missing)}: the path of a list, or a list")
        if self.script != "latin" and kind_named(self.kind).of_any_script is None:
            others = " or ".join(kind.name for kind in KINDS if kind.of_any_script)
            raise ValueError(f"script={self.script}: only kind {others} reads words; {self.kind} needs no script")
        if isinstance(self.prompt, list) and not self.chat:
            raise ValueError("chat=false: a prompt of turns needs the chat template")
        if isinstance(self.prompt, list) and self.prompt[-1].role not in ("user", "tool"):
            raise ValueError(f"the prompt ends with a turn of the {self.prompt[-1].role}: nothing is asked")
        return self

    @model_validator(mode="after")
    def _labels_name_choices(self) -> "Benchmark":
        if not isinstance(self.labels, list):
            return self
        if twice := {str(label) for label in self.labels if [str(x) for x in self.labels].count(str(label)) > 1}:
            raise ValueError(f"labels={self.labels}: {', '.join(sorted(twice))} names several choices")
        if isinstance(self.choices, list) and len(self.choices) != len(self.labels):
            raise ValueError(f"{len(self.choices)} choices, but {len(self.labels)} labels")
        return self


class Task(Strict):
    """Phase 2: the data to adapt to, and the benchmarks to evaluate on."""

    name: Text
    data: Data
    # A text, or turns (a system turn, history); null where the answers' columns hold conversations with the prompt in them.
    prompt: Prompt | None
    # The start of the answer that is part of the prompt, e.g. the steps before those that a pair compares.
    prefix: Template = ""
    chosen: Template
    rejected: Template | None = None
    full_chosen: Template | None = None  # the whole remaining answer, where chosen is only its next step
    full_rejected: Template | None = None
    continuation: Literal["step", "rest"] = "step"
    rendered: StrictBool = False  # rows carry the model's own tokens already: no template is applied
    benchmark: dict[Text, Benchmark] = Field(default={})
    validation: dict[Text, Benchmark] = Field(default={})  # `tune` chooses settings on the first; nothing else reads it
    lm_eval: list[HarnessName] = Field(default=[])  # lm-evaluation-harness's tasks: a name, or a name with settings
    lm_eval_path: PathText | None = None  # a folder of tasks of your own, as YAML files of the harness

    @model_validator(mode="after")
    def _validation_has_names_of_its_own(self) -> "Task":
        if both := ", ".join(self.benchmark.keys() & self.validation.keys()):
            raise ValueError(f"validation.{both}: a benchmark has this name too")
        return self

    @model_validator(mode="after")
    def _harness_has_names_of_its_own(self) -> "Task":
        names = [task.name for task in self.harness_tasks]
        known = [*self.benchmark, *self.validation]
        if both := ", ".join(dict.fromkeys(name for name in names if names.count(name) > 1 or name in known)):
            raise ValueError(f"lm_eval={both}: more than one benchmark has this name")
        return self

    @property
    def harness_tasks(self) -> list[HarnessTask]:
        """Return the harness's tasks, each with its settings."""
        return [HarnessTask(name=task) if isinstance(task, str) else task for task in self.lm_eval]

    @property
    def templates(self) -> list[str]:
        """Return all templates of columns."""
        answers = (self.prefix, self.chosen, self.rejected, self.full_chosen, self.full_rejected)
        return [*_prompt_texts(self.prompt), *filter(None, answers)]


class Warmup(Strict):
    """Phase 1: general conversations; the loss is on every assistant turn."""

    name: Text
    data: Data
    messages: Text = "chosen"  # the column that holds a conversation
    tools: Text = "tools"  # the column that holds the tools it may use, where rows have one
    rendered: StrictBool = False  # the column holds texts that a chat template has made already
    epochs: Positive = 1
