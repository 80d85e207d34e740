"""Whatever a user types for a key gives a plan or one clear line: never a traceback, never something written."""

import copy
import typing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import BaseModel

from d2lora import plan
from d2lora.command import grid
from d2lora.command.guard import guard
from d2lora.errors import UserError
from d2lora.settings import Benchmark, Config, parse

ROOT = Path(__file__).parents[2]
FEW_AT_A_TIME = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def resolved(*overrides: str) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return values


# Between them they have every key of the schema.
BASES = [
    resolved("n=8", "m=8"),
    resolved("n=8", "m=0", "method=dpo", "init=eva"),
    resolved("n=8", "m=8", "method=orpo", "init=lora_ga", "task=lab_title", "method=sft"),
    resolved("n=8", "method=orpo", "init=multilora"),
]


def paths(values: dict, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of all keys, groups and leaves."""
    found = []
    for key, value in values.items():
        found.append((*before, key))
        if isinstance(value, dict):
            found += paths(value, (*before, key))
    return found


def schema(model=Config, before: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The places of all keys that the schema knows; a benchmark's under one name."""
    found = set()
    for name, info in model.model_fields.items():
        inner = info.annotation
        if name == "benchmark":
            inner, before_inner = Benchmark, (*before, name, "lab_math")
        else:
            before_inner = (*before, name)
        found.add((*before, name))
        for kind in typing.get_args(inner) or (inner,):  # a method is one of several classes
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= schema(kind, before_inner)
    return found


PLACES = sorted(schema() | {p for base in BASES for p in paths(base)})
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "all",
        "~",
        "~nobody/x",
        "..",
        ".",
        "a/b",
        "/",
        "{",
        "{}",
        "{x",
        "None/x",
        "null",
        "lab",
        "dpo",
        "\0",
        "\ud800",
        "1e999",
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**32, 10**400, float("nan"), float("inf"), 1e-320])
SIMPLE = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SIMPLE, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=4
)


@pytest.mark.thorough
@settings(max_examples=2_000, deadline=None, derandomize=True, suppress_health_check=FEW_AT_A_TIME)
@given(
    base=st.sampled_from(BASES), changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3)
)
@example(base=BASES[0], changes=[(("recipe", "max_grad_norm"), float("inf"))])
@example(base=BASES[0], changes=[(("output",), "~nobody/x")])
@example(base=BASES[0], changes=[(("model", "gguf_package"), ".x")])
@example(base=BASES[0], changes=[(("sweep",), "..")])
@example(base=BASES[0], changes=[(("task", "data", "path"), "\0")])
def test_any_value_of_any_key_gives_a_plan_or_one_line(base: dict, changes: list, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = copy.deepcopy(base)
    for place, value in changes:
        put(values, place, value)
    told = refusal(values)
    assert told is None or (told.strip() and len(told.splitlines()) == 1), told
    assert not list(tmp_path.iterdir())


def refusal(values: dict) -> str | None:
    """What is said against a config; None if it gives a plan."""
    try:
        checked = parse(values)
        assert plan.Cell(checked, plan.chain(checked)).id
    except UserError as error:
        return str(error)
    return None


def put(values: dict, place: tuple[str, ...], value: object) -> None:
    for key in place[:-1]:
        if not isinstance(values.get(key), dict):
            return
        values = values[key]
    values[place[-1]] = value


TYPED = ["n", "m", "seed", "output", "sweep", "method", "task", "model", "init", "warmup", "recipe", "scale", "method.beta", "recipe.batch",
         "recipe.lr.sft", "recipe.lora.target_modules", "task.data.path", "task.data.where", "task.prompt", "wandb.mode", "nosuch", "a.b", "data_root"]  # fmt: skip
QUOTED = st.text(max_size=8).map(lambda t: QuotedString(text=t, quote=Quote.single).with_quotes())


@pytest.mark.thorough
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=FEW_AT_A_TIME)
@given(
    sign=st.sampled_from(["", "", "", "+", "++", "~"]),
    key=st.sampled_from(TYPED),
    value=st.text(max_size=8)
    | QUOTED
    | NUMBERS.map(str)
    | st.sampled_from(["[1,2]", "{a:1}", "1,2", "${n}", "${oc.env:HOME}", "null", "'"]),
)
def test_whatever_is_typed_gives_a_plan_or_one_line(
    sign: str, key: str, value: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)

    def typed() -> int:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            grid.cell_of(compose("config", overrides=["n=8", "m=8", f"{sign}{key}={value}"]))
        return 0

    with pytest.raises(SystemExit) as end:
        guard(typed)
    told = capsys.readouterr().err
    assert end.value.code in (0, 2)
    assert (len(told.splitlines()) == 1 and told.startswith("error: ")) if end.value.code else told == ""
    assert not list(tmp_path.iterdir())
