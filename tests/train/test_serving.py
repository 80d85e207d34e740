"""What those who serve an adapter read in its files: which base it belongs on, and scales that every reader takes."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import composing
import pytest
import torch
from doing import alone, do, save_tiny
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

from d2lora.adapters import attach, portable
from d2lora.adapters.coverage import layers
from d2lora.base import load_base, read_base
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.settings import Model

SMALL = [
    "recipe.lora.r=4",
    "recipe.lora.alpha=8",
    "recipe.batch=4",
    "recipe.micro_batch=4",
    "n=8",
    "recipe.lr.sft=1e-2",
]
IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cell]:
    """make("init=eva", ...) -> a cell of the tiny model, all in one output."""
    output = tmp_path_factory.mktemp("out")
    return lambda *overrides: composing.cell(f"model.path={tiny}", f"output={output}", *SMALL, *overrides)


def trained(cell: Cell) -> Path:
    """Train the cell and return the folder of its adapter."""
    return do(alone(cell)).folder(cell.chain.adapter) / "adapter"


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def ours(cell: Cell, folder: Path, quantize: bool = False) -> torch.Tensor:
    """The logits of the adapter as evaluations have it."""
    base = load_base(cell.config.model, Outputs.of(cell.config).models)
    with attach.trained(base, folder, quantize) as (tested, _):
        return logits(tested)


def test_an_adapter_s_config_names_a_base_that_exists(make) -> None:
    cell = make("method=sft")
    folder = trained(cell)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert (logits(model) - ours(cell, folder)).abs().max() < 1e-4
    assert (logits(model.get_base_model()) - logits(model)).abs().max() < 1e-6
    with model.disable_adapter():
        assert (logits(model) - ours(cell, folder)).abs().max() > 1e-3, "the adapter is on it"


def test_a_base_is_named_as_it_was_typed(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def source(path: str) -> tuple[str, str | None]:
        base = read_base(Model(name="it", path=path), tmp_path)
        return base.source, base.revision

    assert source("d2lora/lab/base") == ("d2lora/lab/base", None)
    assert source(str(tiny)) == (str(tiny), None)
    (tmp_path / "link").symlink_to(tiny)
    assert source(str(tmp_path / "link")) == (str(tmp_path / "link"), None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source("~/link") == (str(tmp_path / "link"), None), "transformers knows no ~"
    monkeypatch.chdir(tmp_path)
    assert source("link") == (str(tiny), None), "it works from other folders too"


def test_loftq_s_files_say_that_it_belongs_on_a_quantized_base(make, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="LoftQ needs bitsandbytes: pip install -e '.[loftq]'")
    wide = save_tiny(tmp_path, 64)  # bitsandbytes computes on a CPU where blocks of 64 fill rows
    cell = make("method=sft", "init=loftq", f"model.path={wide}")
    folder = trained(cell)
    settings = json.loads((folder / "quantization_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    expected = ours(cell, folder, quantize=True)
    assert (logits(model) - expected).abs().max() < 0.02 * expected.abs().max()
    plain = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    assert (plain - expected).abs().max() > 2 * (logits(model) - expected).abs().max()
    assert "in 4 bits" in (folder / "README.md").read_text()
    prepared = do(alone(cell)).folder(cell.chain.prepare) / "adapter"
    assert (prepared / "quantization_config.json").exists()
    assert not (trained(make("method=sft")) / "quantization_config.json").exists()


@pytest.mark.parametrize("init", ["eva", "rslora", "lora"])
def test_a_portable_copy_has_one_scale_and_the_same_outputs(make, tmp_path: Path, init: str) -> None:
    cell = make("method=sft", f"init={init}", *(["init.samples=8"] if init == "eva" else []))
    folder, copy = trained(cell), tmp_path / "copy"
    changed = portable.write(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert (changed > 0) == (init != "lora")
    read_plainly = _scaled_by_alpha_over_rank(copy)
    assert (read_plainly - ours(cell, folder)).abs().max() < 1e-4
    if changed:
        assert (_scaled_by_alpha_over_rank(folder) - ours(cell, folder)).abs().max() > 1e-3
    with pytest.raises(UserError, match="exists already"):
        portable.write(folder, copy)
    with pytest.raises(UserError, match="no adapter here"):
        portable.write(tmp_path, tmp_path / "other")


def _scaled_by_alpha_over_rank(folder: Path) -> torch.Tensor:
    """The logits that a program gives that takes lora_alpha / rank for every layer's scale, as llama.cpp does."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    for layer in layers(model).values():
        layer.scaling["default"] = model.peft_config["default"].lora_alpha / layer.r["default"]
    return logits(model)


def test_dora_has_no_portable_copy_and_needs_none(make, tmp_path: Path) -> None:
    folder = trained(make("method=sft", "init=dora"))
    assert portable.write(folder, tmp_path / "copy") == 0
