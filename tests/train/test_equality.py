"""How a training is computed changes its result by rounding only: by which layers, in which passes and layouts."""

import shutil
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from doing import adapter, alone, do
from transformers import AutoTokenizer

from d2lora.adapters import lean
from d2lora.base import LOADED
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.settings import INIT_NAMES, METHOD_NAMES, init_of
from d2lora.settings.inits import QUANTIZING, FromRowsInit
from d2lora.settings.recipe import PASS_TOKENS
from d2lora.train import training

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families
from configurations import configurations

Outcome = tuple[dict[str, torch.Tensor], list[float]]

RATE = 2e-4  # Adam makes steps of this size even of gradients that are rounding: it bounds how far those can lead
SMALL = [
    "recipe.lora.r=4", "recipe.lora.alpha=6", "recipe.batch=4", "recipe.micro_batch=auto", "n=16", "m=8", "method.epochs=1", "recipe.max_length=512",
    *(f"recipe.lr.{phase}={RATE}" for phase in ("warmup", "sft", "dpo", "orpo")),
]  # fmt: skip


def trained(cell: Cell) -> Outcome:
    """Train the cell's adaptation, and return its adapter and the losses; preparation and warm-up are left for the next."""
    store = do(alone(cell))
    log = store.record(cell.chain.adapt).metrics["log"]
    result = adapter(cell), [entry["loss"] for entry in log]
    shutil.rmtree(store.folder(cell.chain.adapt))
    shutil.rmtree(Outputs.of(cell.config).references, ignore_errors=True)
    return result


def off(one: Outcome, other: Outcome) -> float:
    """Return the largest difference of two adapters' entries."""
    assert one[0].keys() == other[0].keys()
    return max(float((weight - other[0][name]).abs().max()) for name, weight in one[0].items())


# --- the layers of adapters.lean against PEFT's and transformers' own --------------------------------------------------


def by_both(cell: Cell) -> tuple[Outcome, Outcome]:
    """Train with the layers of `lean`, and with PEFT's and transformers' own."""
    outcomes = []
    for layers in (nullcontext, lean.suspended):
        with layers():
            outcomes.append(trained(cell))
    return outcomes[0], outcomes[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all cells share: preparations and warm-ups are done once."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture
def make(cell, tiny: Path, output: Path):
    """make("init=pissa", ...) -> a cell of the tiny model."""

    def of(*overrides: str) -> Cell:
        init = next((o.removeprefix("init=") for o in overrides if o.startswith("init=")), "lora")
        if init in QUANTIZING and not find_spec("bitsandbytes"):
            pytest.skip("bitsandbytes is not installed")
        rows = ["init.samples=8"] if issubclass(init_of(init), FromRowsInit) else []
        return cell(f"model.path={tiny}", f"output={output}", *SMALL, *rows, *overrides)

    return of


slow = pytest.mark.slow
FAST = {("pissa", "dpo:base"), ("eva", "dpo:base"), ("loftq", "kto"), ("loftq", "orpo"), ("multilora", "simpo")}
NAMED = [*METHOD_NAMES, "dpo:base", "kto:base"]  # methods, and those whose reference is not the one by default
CELLS = [(init, name) for init in INIT_NAMES for name in NAMED if not (init in QUANTIZING and name.endswith(":base"))]


def overrides_of(init: str, named: str) -> list[str]:
    method, _, reference = named.partition(":")
    return [f"init={init}", f"method={method}", *([f"method.reference={reference}"] if reference else [])]


@pytest.mark.parametrize(
    ("init", "named"), [pytest.param(*one, marks=[] if one in FAST else slow, id="-".join(one)) for one in CELLS]
)
def test_lean_layers_train_what_peft_s_do(make, init: str, named: str) -> None:
    """Each initialization under each method, with both references."""
    ours, peft_s = by_both(make(*overrides_of(init, named)))
    assert off(ours, peft_s) < 1e-5
    assert ours[1] == pytest.approx(peft_s[1], abs=1e-5)
    assert off(ours, peft_s) > 0, "they were in use"


@pytest.mark.parametrize("method", ["dpo", *(pytest.param(m, marks=slow) for m in METHOD_NAMES if m != "dpo")])
def test_lean_layers_lose_what_peft_s_do_in_bfloat16(make, method: str, monkeypatch) -> None:
    """With a base in bfloat16 and autocast, as on a GPU."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    ours, peft_s = by_both(make(f"method={method}", "model.dtype=bfloat16"))
    LOADED.clear()
    assert ours[1] == pytest.approx(peft_s[1], abs=1e-3)
    assert off(ours, peft_s) > 0, "they were in use"


# --- passes and layouts, by family -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """saved("gemma3 sw8") -> the folder of a tiny model of that family."""
    folder = tmp_path_factory.mktemp("families")

    def save(name: str) -> Path:
        place = folder / name.replace(" ", "-")
        if not place.is_dir():
            families.build(configurations()[name]()).save_pretrained(place)
            AutoTokenizer.from_pretrained(families.ROOT / "d2lora/lab/base").save_pretrained(place)
        return place

    return save


FAMILIES = ("gemma3 sw8", "qwen3", "phi3", "mixtral", "gpt2", "falcon_h1", "gemma2 sw8", "qwen3_moe", "lfm2")
SHORT = {("mixtral", "simpo"), ("gpt2", "kto")}  # methods that test_families.py does not train
WAYS = [("prefix_shared", "4"), ("prefix_shared", "auto"), ("padded", "1")]


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, marks=[] if (f, m) in SHORT else slow, id=f"{f}-{m}") for f in FAMILIES for m in METHOD_NAMES],
)
def test_no_family_s_result_depends_on_passes_or_layout(
    cell, saved, tmp_path: Path, monkeypatch, family: str, method: str
) -> None:
    """Ten steps by passes of four rows, of as many as 300 tokens hold, and of one row padded; the last batch is not full.

    Adam's epsilon is 1e-6: at 1e-8 entries of Mixtral's experts under DPO, whose gradients are that small, move by rounding.
    """
    monkeypatch.setitem(PASS_TOKENS, "cpu", 300)
    arguments = training.arguments
    monkeypatch.setattr(training, "arguments", lambda *args: arguments(*args) | {"adam_epsilon": 1e-6})
    base = [f"model.path={saved(family)}", f"output={tmp_path}", f"method={method}", *SMALL, "n=38", "m=0"]
    first, *others = (trained(cell(*base, f"recipe.packing={p}", f"recipe.micro_batch={rows}")) for p, rows in WAYS)
    for way, other in zip(WAYS[1:], others, strict=True):
        assert off(first, other) < 1e-5, way
        assert other[1] == pytest.approx(first[1], abs=1e-4), way
