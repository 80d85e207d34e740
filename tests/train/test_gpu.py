"""On a GPU: what a CPU trains and says, and what only a GPU has (bfloat16, FlexAttention's kernels, memory that ends)."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from doing import adapter, alone, do
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available

from d2lora import data
from d2lora.base import memory_mb
from d2lora.layouts import by_text, packing
from d2lora.layouts.families import Reach
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import Record
from d2lora.settings import METHOD_NAMES
from d2lora.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu")]
INITS = sorted((data.ROOT / "conf/init").glob("*.yaml"))
SMALL = [
    *("n=22", "m=20", "recipe.batch=8", "recipe.micro_batch=4"),
    *(f"recipe.lr.{phase}=1e-3" for phase in ("warmup", "sft", "dpo", "orpo")),  # others take that of one they are like
    "method.epochs=1",
    *("task.benchmark.lab_math.limit=40", "task.benchmark.lab_facts.limit=40"),
]
LAYOUTS = {
    "padded": ["recipe.packing=padded"],
    "packed": [],
    "flex": ["recipe.attention=flex_attention"],
    "checkpointing": ["recipe.gradient_checkpointing=true"],
}


@pytest.fixture
def make(cell, tmp_path: Path):
    """make("out", "method=dpo", ...) -> a cell of the lab's base, its output in tmp_path/out."""

    def one(output: str, *overrides: str) -> Cell:
        return cell(f"output={tmp_path / output}", *SMALL, *overrides)

    return one


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative distance of two adapters' B, which starts at zero: of what was learned."""
    names = [name for name in expected if "lora_B" in name]
    return math.sqrt(sum(float((found[n] - expected[n]).square().sum()) for n in names)) / math.sqrt(
        sum(float(expected[n].square().sum()) for n in names)
    )


def items(cell: Cell, benchmark: str) -> list[dict]:
    store = Store(Outputs.of(cell.config).root)
    stage = next(s for s in cell.chain.evaluations if store.record(s).benchmark == benchmark)
    return [json.loads(line) for line in (store.folder(stage) / "items.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a grid whose machine has no GPU: every method, from the same command."""
    output = tmp_path_factory.mktemp("cpu")
    command = [
        sys.executable,
        str(data.ROOT / "run.py"),
        "-m",
        f"method={','.join(METHOD_NAMES)}",
        f"output={output}",
        *SMALL,
    ]
    subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_in_float32_a_gpu_trains_and_answers_as_a_cpu(make, on_cpu: Path, method: str, layout: str) -> None:
    cell = make("gpu", f"method={method}", *LAYOUTS[layout])
    record = do(cell).record(cell.chain.adapt)
    there = make(str(on_cpu), f"method={method}")
    assert there.chain.adapt.key == cell.chain.adapt.key
    assert apart(adapter(cell), adapter(there)) < 0.02
    expected = Store(Outputs.of(there.config).root).record(there.chain.adapt).metrics["first_loss"]
    assert record.metrics["first_loss"] == pytest.approx(expected, rel=1e-4)
    assert record.provenance.hardware["gpu"] == torch.cuda.get_device_name()
    assert 0 < record.peak_memory_mb < torch.cuda.get_device_properties(0).total_memory / 2**20
    for here, expected in zip(items(cell, "lab_facts"), items(there, "lab_facts"), strict=True):
        assert here["loglikelihoods"] == pytest.approx(expected["loglikelihoods"], abs=0.05)
    pairs = zip(items(cell, "lab_math"), items(there, "lab_math"), strict=True)
    assert sum(here["answer"] != expected["answer"] for here, expected in pairs) <= 2, "a tie may fall otherwise"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_in_bfloat16_it_learns_nearly_the_same(make, method: str, layout: str) -> None:
    exact, rounded = make("float32", f"method={method}"), make(
        "bfloat16", f"method={method}", "model.dtype=bfloat16", *LAYOUTS[layout]
    )  # fmt: skip
    wanted, found = (do(c).record(c.chain.adapt).metrics for c in (exact, rounded))
    assert found["first_loss"] == pytest.approx(wanted["first_loss"], rel=0.02)
    assert found["last_loss"] == pytest.approx(wanted["last_loss"], rel=0.1, abs=0.02)
    assert apart(adapter(rounded), adapter(exact)) < 0.6
    assert all(weight.dtype == torch.float32 for weight in adapter(rounded).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", INITS, ids=lambda file: file.stem)
def test_every_initialization_runs(make, init: Path, dtype: str) -> None:
    if init.stem == "loftq" and not find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    rows = ["init.data=general", "init.samples=64"] if "samples" in init.read_text() else []
    cell = make("out", "method=dpo", f"init={init.stem}", f"model.dtype={dtype}", *rows)
    metrics = do(cell).record(cell.chain.adapt).metrics
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=0.02 if dtype == "bfloat16" else 1e-4)
    assert all(math.isfinite(entry["loss"]) for entry in metrics["log"])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_same_cell_twice_gives_the_same_adapter(make, method: str) -> None:
    one, other = make("one", f"method={method}"), make("other", f"method={method}")
    do(one), do(other)
    assert all(torch.equal(weight, adapter(other)[name]) for name, weight in adapter(one).items())


def test_an_interrupted_training_goes_on(make) -> None:
    def interrupt(done: int, total: int) -> None:
        if (done, total) == (7, 12):
            raise KeyboardInterrupt

    settings = ["method=dpo", "n=48", "m=0", "method.epochs=2", "recipe.checkpoint_minutes=0"]
    calm, broken = make("calm", *settings), make("broken", *settings)
    do(calm)
    with pytest.raises(KeyboardInterrupt):
        do(broken, interrupt)
    assert do(broken).record(broken.chain.adapt).metrics["resumed"]["step"] == 6
    assert apart(adapter(broken), adapter(calm)) < 1e-5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama wide enough that a micro-batch takes memory, with the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(data.ROOT / "d2lora/lab/base")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_in_less(cell: Cell, peak_mb: float) -> Record:
    """Return the record of an adaptation with 60 % of the memory that it took, beyond the base's, for a peak of `peak_mb`."""
    base_mb = memory_mb()
    torch.cuda.empty_cache()
    room = (base_mb + 0.6 * (peak_mb - base_mb)) * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        return do(alone(cell)).record(cell.chain.adapt)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_memory_that_ends_halves_the_micro_batch(make, wide: Path, method: str, capsys) -> None:
    settings = [f"model.path={wide}", f"method={method}", "n=128", "m=0", "recipe.batch=64", "recipe.micro_batch=64"]
    calm, tight = make("calm", *settings), make("tight", *settings)
    wanted = do(alone(calm)).record(calm.chain.adapt)
    found = trained_in_less(tight, wanted.peak_memory_mb)
    assert "again with recipe.micro_batch=32" in capsys.readouterr().err
    assert found.metrics["micro_batch"] in (16, 32)
    assert found.metrics["steps"] == wanted.metrics["steps"] == 2
    assert apart(adapter(tight), adapter(calm)) < 0.02


@pytest.mark.parametrize("examples", ["pairs", "rows"])
def test_attention_by_text_is_attention_with_a_mask(examples: str) -> None:
    """PyTorch's kernel for texts of different lengths, in bfloat16, with its gradients; keys have fewer heads."""
    sizes = ((70, 40, 30), (5, 190, 1), (2, 1, 80))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [{name: [5] * size for name, size in zip(names, these, strict=True)} for these in sizes]
    rows = [{"input_ids": [5] * sum(these), "labels": [5] * sum(these)} for these in sizes]
    layout = packing.Layout(attention=by_text.BY_TEXT, step=packing.BLOCK)
    packed = packing.pack(pairs if examples == "pairs" else rows, layout, 64)["passes"][0]
    on_gpu = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in packed.items()}
    length = packed["ids"].shape[1]
    assert length % packing.BLOCK == 0
    torch.manual_seed(0)
    states = [torch.randn(1, h, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    exact = [state.detach().float().requires_grad_() for state in states]
    repeated = [exact[0], *(state.repeat_interleave(2, 1) for state in exact[1:])]
    mask = packing.attention(on_gpu, Reach())
    expected = torch.nn.functional.scaled_dot_product_attention(*repeated, attn_mask=mask).transpose(1, 2)
    found, _ = by_text.attend(torch.nn.Module(), *states, None, stretches=packed["stretches"])
    used = on_gpu["sequence"][0] >= 0
    assert torch.allclose(found[0, used].float(), expected[0, used], atol=0.03, rtol=0.03)
    weight = torch.randn(found.shape, device="cuda") * used[None, :, None, None]
    for one, other in zip(
        torch.autograd.grad((found.float() * weight).sum(), states),
        torch.autograd.grad((expected * weight).sum(), exact),
        strict=True,
    ):
        assert torch.allclose(one.float(), other, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "how", [["recipe.attention=by_text"], ["recipe.attention=flex_attention"], ["recipe.compile=layers"]]
)
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_in_bfloat16_each_way_gives_the_losses_of_sdpa(make, method: str, how: list[str]) -> None:
    common = [f"method={method}", "model.dtype=bfloat16", "recipe.micro_batch=auto"]
    plain, other = make("plain", *common, "recipe.attention=sdpa"), make("other", *common, *how)
    wanted, found = (do(alone(c)).record(c.chain.adapt).metrics for c in (plain, other))
    if how[0].startswith("recipe.attention="):
        assert found["attention"] == how[0].split("=")[1]
    assert found["first_loss"] == pytest.approx(wanted["first_loss"], abs=5e-3)
    assert found["last_loss"] == pytest.approx(wanted["last_loss"], rel=0.05, abs=0.01)


@pytest.mark.skipif(not is_kernels_available(), reason="needs kernels, and what it loads from the Hub")
def test_kernels_of_the_hub_give_the_losses_of_none(make) -> None:
    plain, other = (make(out, "model.dtype=bfloat16", how) for out, how in (("plain", "recipe.kernels=false"), ("other", "recipe.kernels=true")))  # fmt: skip
    wanted, found = (do(alone(c)).record(c.chain.adapt).metrics for c in (plain, other))
    assert found["last_loss"] == pytest.approx(wanted["last_loss"], rel=0.05, abs=0.01)


def test_memory_that_ends_divides_a_pass_in_its_step(make, wide: Path, capsys) -> None:
    settings = [f"model.path={wide}", "method=dpo", "n=128", "m=0", "recipe.batch=64", "recipe.micro_batch=auto"]
    calm, tight = make("calm", *settings), make("tight", *settings)
    wanted = do(alone(calm)).record(calm.chain.adapt)
    found = trained_in_less(tight, wanted.peak_memory_mb)
    assert "again with recipe.micro_batch=auto" in capsys.readouterr().err
    assert found.metrics["pass_tokens"] < wanted.metrics["pass_tokens"] == 8192
    assert apart(adapter(tight), adapter(calm)) < 0.02
