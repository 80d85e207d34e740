import os
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf.errors import OmegaConfBaseException

from d2lora.errors import UserError
from d2lora.settings import METHOD_NAMES, METHODS, Machine, Orpo, Recipe, Training, method_of

ROOT = Path(__file__).parents[2]
GROUPS = ["model", "task", "method", "init", "warmup", "recipe", "scale"]
# What needs a folder of the user's.
DATA_ROOT = {"math_local", "local", "laptop"}


@pytest.mark.parametrize(
    "choice", [f"{g}={f.stem}" for g in GROUPS for f in sorted((ROOT / "conf" / g).glob("*.yaml"))]
)
def test_every_option_of_every_group_composes(cell, choice: str, monkeypatch) -> None:
    from d2lora import plan
    from d2lora.command import grid

    # The plan reads local data, which a user's folders or an extra's weights are not: only the schema is tried here.
    monkeypatch.setattr(grid.plan, "chain", lambda config: plan.Chain())
    option = choice.split("=")[1]
    config = cell(choice, *(["data_root=/somewhere"] if option in DATA_ROOT else [])).config
    assert config.n == 1000


def test_the_paper_s_scale_has_table_2_s_settings(cell) -> None:
    for method, epochs in (("sft", 3), ("dpo", 4), ("orpo", 4)):
        c = cell("scale=paper", f"method={method}", "m=40000").config
        assert (c.model.name, c.task.name, c.warmup.name) == ("llama-3.1-8b-instruct", "math", "mix40k")
        assert (c.recipe.lora.r, c.recipe.lora.alpha, c.recipe.schedule) == (16, 16, "cosine")
        assert (c.recipe.rate("warmup"), c.warmup.epochs) == (1e-7, 1)
        assert (c.recipe.rate(method), c.method.epochs) == (1e-6, epochs)
        assert getattr(c.method, "beta", None) == (None if method == "sft" else 0.1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["n=-3"], ["n=-3", "whole number", "all"]),
        (["n=1.5"], ["n=1.5", "whole number"]),
        (["n=many"], ["n=many", "all"]),
        (["m=true"], ["m=True", "whole number"]),
        (["recipe.batch=0"], ["recipe.batch=0", "greater than 0"]),
        (["recipe.micro_batch=5"], ["batch=8", "micro_batch=5"]),
        (["recipe.lr.sft=0"], ["recipe.lr.sft=0"]),
        (["+recipe.bach=4"], ["recipe.bach", "no such key"]),
        (["method=kto", "n=1"], ["n=1: method=kto needs 2 rows or more, or 0"]),
        (["method=dpo", "method.reference=policy"], ["method.reference=policy", "warm_start"]),
        (["method=dpo", "task=lab_title"], ["method=dpo", "lab-title", "rejected", "sft"]),
        (["method=sft", "+method.beta=0.1"], ["method.beta: there is no such key", "method=sft", "takes epochs"]),
        (["method=dpo", "~method.reference"], ["method.reference: missing"]),
        (["method=dpo", "method.beta=null"], ["method.beta=None"]),
        (["method.name=ppo"], ["method.name=ppo: one of sft, dpo, orpo"]),
        (["~method.name"], ["method.name: missing"]),
        (["+recipe.lr.ppo=1"], ["recipe.lr: there is no ppo: warmup, sft, dpo, orpo"]),
        (["~recipe.lr.dpo"], ["recipe.lr: missing dpo"]),
        (["task.prompt={question"], ["task.prompt", "{column}"]),
        (["task.data.path=nowhere"], ["nowhere", "neither"]),
        (["task.data.path=owner/name"], ["owner/name", "revision"]),
        (["sweep=a/b"], ["sweep=a/b: letters, digits"]),
        (["n='5'"], ["n='5', a text: a whole number"]),
        (["recipe.lora.r='16'"], ["recipe.lora.r='16', a text: input should be a valid integer"]),
        (["recipe.lr_factor='1'"], ["lr_factor='1', a text: a number above 0"]),
        (["recipe.lr=1e-3"], ["recipe.lr=0.001: a group of settings", "recipe.lr.NAME=VALUE"]),
        (["recipe.lora=16"], ["recipe.lora=16: a group of settings", "recipe.lora.NAME=VALUE"]),
        (["task.data.path=''"], ["task.data.path=: a path"]),
        (["task.data.path=' '"], ["task.data.path= : a path"]),
        (["objective=lab_math"], ["objective=lab_math: BENCHMARK/METRIC"]),
        (["objective=nosuch/accuracy"], ["objective=nosuch/accuracy", "lab_math, lab_facts"]),
        (["objective=lab_facts/accuracy"], ["lab_facts has acc"]),
        (["+task.benchmark.lab_math.data.part=held_out"], ["part=held_out", "hold_out"]),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_them(cell, overrides: list[str], words: list[str]) -> None:
    with pytest.raises((UserError, OmegaConfBaseException)) as caught:
        cell(*[o.replace("{", "'{").replace("question", "question'") if "{" in o else o for o in overrides])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_the_prompt_of_the_lab_s_corpus_is_that_of_its_tasks(cell) -> None:
    from d2lora.lab import world

    task = cell().config.task
    question = {"question": "Q"}
    assert (
        task.prompt.format(prompt="Q")
        == world.PROMPT.format(**question)
        == task.benchmark["lab_math"].prompt.format(**question)
    )
    assert cell("task=lab_title").config.task.prompt == world.TITLE_PROMPT


def test_what_is_said_of_data_root_can_be_typed(cell) -> None:
    """A ~ can't: shells leave it as it is inside an argument, and Hydra's grammar refuses it."""
    with pytest.raises(UserError) as refused:
        cell("scale=laptop")
    said = re.findall(r"data_root=[~$/]\S*", f"{refused.value}\n{(ROOT / 'docs' / 'running.md').read_text()}")
    assert len(said) >= 2
    for override in said:
        value = OverridesParser.create().parse_override(os.path.expandvars(override)).value()
        assert Path(value).is_absolute()


def test_a_method_may_take_its_rate_from_one_it_is_like(cell, monkeypatch) -> None:
    monkeypatch.setattr(Orpo, "rates_like", "dpo")
    lr = cell("~recipe.lr.orpo", "method=orpo").config.recipe.lr
    assert lr["orpo"] == lr["dpo"]


def test_a_recipe_may_list_a_method_s_own_rate_and_epochs(cell) -> None:
    like = cell("method=simpo", "recipe.epochs.dpo=3").config
    assert (like.recipe.rate("simpo"), like.method.epochs) == (like.recipe.rate("dpo"), 3)
    own = cell("method=simpo", "+recipe.lr.simpo=5e-6", "+recipe.epochs.simpo=7").config
    assert (own.recipe.rate("simpo"), own.method.epochs) == (5e-6, 7)


def test_each_method_carries_its_facts() -> None:
    assert METHOD_NAMES[:3] == ("sft", "dpo", "orpo"), "the paper's, in its order"
    assert [m.label.lower() for m in METHODS] == list(METHOD_NAMES)
    assert len({m.colour for m in METHODS}) == len({m.marker for m in METHODS}) == len(METHODS)
    assert all(method_of(name).model_fields["name"].default == name for name in METHOD_NAMES)


def test_with_dropout_auto_is_what_it_was_before_it_existed(cell) -> None:
    """The layout is in the key then: it must not depend on a machine's memory."""
    plain, dropout = (cell("scale=paper", f"recipe.lora.dropout={p}").config.recipe for p in (0, 0.1))
    assert (plain.micro_batch, plain.attention) == ("auto", "auto")
    assert (dropout.micro_batch, dropout.attention, dropout.packing) == (4, "sdpa", "prefix_shared")
    typed = cell("scale=paper", "recipe.lora.dropout=0.1", "recipe.micro_batch=8", "recipe.attention=flex_attention")
    assert (typed.config.recipe.micro_batch, typed.config.recipe.attention) == (8, "flex_attention")
    assert cell("scale=paper", "recipe.lora.dropout=0.1", "recipe.batch=6").config.recipe.micro_batch == 2


def test_a_recipe_is_what_is_in_the_key_and_what_is_not(cell) -> None:
    assert set(Recipe.model_fields) == set(Training.model_fields) | set(Machine.model_fields)
    assert not set(Training.model_fields) & set(Machine.model_fields)
    plain, dropout = (set(cell("m=8", f"recipe.lora.dropout={p}").chain.warmup.spec.content()) for p in (0, 0.1))
    assert set(Training.model_fields) - {"name"} <= plain
    assert not plain & set(Machine.model_fields)
    assert dropout - plain == {"packing", "micro_batch", "attention"}
