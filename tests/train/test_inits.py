"""Every initialization under every method on a tiny random model: starts as the base, continues, works for anyone."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import composing
import made
import pytest
import torch
from doing import alone, do
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from d2lora import data, plan, worker
from d2lora.adapters import attach, eva, lora_ga
from d2lora.adapters.coverage import layers
from d2lora.adapters.loftq import nf4, quantized
from d2lora.adapters.preparations import PREPARATIONS, prepare
from d2lora.adapters.start import Start, fresh
from d2lora.base import Base, load_base
from d2lora.command import preflight
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.settings import INITS as CLASSES
from d2lora.settings import Lora, init_of
from d2lora.stages import Run, Stage, rows, training
from d2lora.store import Store

R = 4
FROM_WEIGHTS = ["pissa", "pissa_niter_16", "olora", "milora"]
FROM_DATA = ["corda_kpm", "corda_ipm", "eva", "lora_ga"]
PREPARED = FROM_WEIGHTS + FROM_DATA
VARIANTS = [init.model_fields["name"].default for init in CLASSES if init.variant]
INITS = ["lora", "gaussian", "orthogonal", "multilora", *VARIANTS, *PREPARED]
LOFTQ = ["loftq"] if find_spec("bitsandbytes") else []
MOVING = [name for name in PREPARED if name != "eva"]
CELLS = [(init, method, m) for init in INITS for method in ("sft", "dpo", "orpo") for m in (0, 8)]
LAYERS = 14
SMALL = [f"recipe.lora.r={R}", "recipe.lora.alpha=8", "recipe.batch=4", "recipe.micro_batch=4", "n=8"]
RATES = [f"recipe.lr.{phase}=1e-3" for phase in ("warmup", "sft", "dpo", "orpo")]
SMALL += RATES + [f"recipe.epochs.{method}=1" for method in ("sft", "dpo", "orpo")]
IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cell]:
    """make("init=pissa", ...) -> a cell of the tiny model; all share one output, so each stage is done once."""
    output = tmp_path_factory.mktemp("out")

    def cell(*overrides: str, m: int = 0) -> Cell:
        samples = ["init.samples=8"] if any(o.removeprefix("init=") in FROM_DATA for o in overrides) else []
        composed = composing.cell(f"model.path={tiny}", f"output={output}", *SMALL, *samples, *overrides).config
        config = composed.model_copy(update={"m": m})  # composing takes longer than some of the tests
        return Cell(config, plan.chain(config))

    return cell


def train(cell: Cell) -> Store:
    """The cell's trainings, done; no evaluations."""
    return do(alone(cell))


def of(cell: Cell) -> Base:
    return load_base(cell.config.model, Outputs.of(cell.config).root)


def start_of(cell: Cell) -> Start:
    """What the cell's trainings give an adapter to begin from."""
    return Start(cell.config.recipe.lora, cell.config.init, cell.config.seed)


@torch.inference_mode()
def logits(some_model: torch.nn.Module) -> torch.Tensor:
    return some_model(input_ids=IDS).logits.float()


def parameters(wrapped: PeftModel) -> int:
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def original(tiny: Path, record: Path) -> PeftModel:
    """What anyone gets who loads the adapter on the base."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), record / "adapter")


@pytest.mark.parametrize(("init", "method", "m"), CELLS)
def test_an_init_keeps_its_promises_under_every_method(make, tiny: Path, init: str, method: str, m: int) -> None:
    cell = make(f"init={init}", f"method={method}", m=m)
    store, base = train(cell), of(cell)
    stages = [s for s in (cell.chain.prepare, cell.chain.warmup, cell.chain.adapt) if s]
    plain, counts = logits(base.model), []
    for stage in stages:
        with attach.adapter(base, start_of(cell), store.folder(stage)) as wrapped:
            counts.append(parameters(wrapped))
            continued = logits(wrapped)
            with wrapped.disable_adapter():
                assert torch.equal(logits(wrapped), plain), "without its adapter it is the base"
        anyone = logits(original(tiny, store.folder(stage)))
        assert (anyone - continued).abs().max() < 1e-4, stage.kind
        moved = (continued - plain).abs().max()
        assert moved < 1e-4 if stage.kind == "prepare" else moved > 1e-4, stage.kind
    with attach.adapter(base, start_of(cell), None) as wrapped:
        assert (logits(wrapped) - plain).abs().max() < 1e-4, "at step 0 it is the base"
        counts.append(parameters(wrapped) if init != "eva" else counts[0])
    assert len(set(counts)) == 1, "the same parameters are trained from start to end"
    if method == "dpo":
        first = store.record(cell.chain.adapt).metrics["first_loss"]
        assert first == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_adding_dpo_s_reference_changes_the_policy_by_nothing(make, init: str) -> None:
    cell = make(f"init={init}", "method=dpo", m=8)
    store, base = train(cell), of(cell)
    with attach.adapter(base, start_of(cell), store.folder(cell.chain.warmup)) as wrapped:
        before, trained = logits(wrapped), {n for n, p in wrapped.named_parameters() if p.requires_grad}
        wrapped.add_adapter("ref", wrapped.peft_config["default"])  # as TRL does
        wrapped.delete_adapter("ref")
        assert torch.equal(logits(wrapped), before)
        assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == trained


def running(cell: Cell, stage: Stage) -> Run:
    """A stage as its work is given it."""
    return Run(cell.config, stage, Path(), lambda done, total: None)


def reference_values(cell: Cell) -> tuple[list, torch.Tensor]:
    """The log-probabilities that DPO's reference gave the cell's pairs, and the pairs' examples."""
    run = running(cell, cell.chain.adapt)
    method = cell.config.method
    folder = training.reference_folder(run, method.base_is_reference, run.stage.spec.VERSION)
    values = [value for file in sorted(folder.glob("*.json")) for value in json.loads(file.read_text())]
    return values, rows.task(run, 8, run.stage.spec.max_length, preference=True)


@torch.inference_mode()
def answer_log_probs(policy: torch.nn.Module, example: dict) -> list[float]:
    """[chosen, rejected] of a pair, one sequence at a time, by the definition."""
    found = []
    for kind in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([example["prompt_ids"] + example[kind]])
        steps = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores = steps.gather(1, ids[0, 1:, None])[:, 0]
        found.append(float(scores[len(example["prompt_ids"]) - 1 :].sum()))
    return found


@pytest.mark.parametrize("init", INITS + LOFTQ)
@pytest.mark.parametrize(("reference", "m"), [("warm_start", 0), ("warm_start", 8), ("base", 8)])
def test_dpo_s_reference_is_what_the_config_says(
    make, tiny: Path, tmp_path: Path, monkeypatch, init: str, reference: str, m: int
) -> None:
    if (init, reference) == ("loftq", "base"):
        pytest.skip("refused")
    # A training of its own, with a reference of its own: all that start as the base would share one.
    monkeypatch.setattr(training, "reference_folder", lambda *asked: tmp_path)
    cell = make(f"init={init}", "method=dpo", f"method.reference={reference}", "method.beta=0.2", m=m)
    store, base = train(cell), of(cell)
    values, drawn = reference_values(cell)
    with contextlib.ExitStack() as stack:
        if init == "loftq":
            start = store.folder(cell.chain.adapt.parent)
            policy = stack.enter_context(attach.adapter(base, start_of(cell), start))
        elif m and reference == "warm_start":
            policy = original(tiny, store.folder(cell.chain.warmup))
        else:
            policy = base.model
        for example, value in zip([*drawn.examples, *drawn.ahead], values, strict=True):
            assert value == pytest.approx(answer_log_probs(policy, example), abs=2e-3)


@pytest.mark.parametrize("init", ["pissa", "milora", "corda_ipm", "lora_ga", "multilora", *VARIANTS])
def test_on_a_bfloat16_base_it_starts_as_the_base_bit_for_bit(make, init: str) -> None:
    cell = make(f"init={init}", "model.dtype=bfloat16")
    store, base = train(cell), of(cell)
    place = store.folder(cell.chain.prepare) if cell.chain.prepare else None
    with attach.adapter(base, start_of(cell), place) as wrapped:
        assert torch.equal(logits(wrapped), logits(base.model))
        assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    tensors = load_file(store.folder(cell.chain.adapt) / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


# --- the init is the one asked for ---------------------------------------------------------------------------------


def started(make, init: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, str]]:
    """(W, A, B, s, name) of each layer before it is trained."""
    cell = make(f"init={init}")
    store, base = train(cell), of(cell)
    place = store.folder(cell.chain.prepare) if cell.chain.prepare else None
    with attach.adapter(base, start_of(cell), place) as wrapped:
        found = layers(wrapped)
        assert len(found) == LAYERS
        for name, layer in found.items():
            A, B = (layer.__getattr__(f"lora_{x}")["default"].weight.detach() for x in "AB")
            place = name.removeprefix("base_model.model.")
            yield layer.get_base_layer().weight.detach(), A, B, layer.scaling["default"], place


def truncated(matrix: torch.Tensor, part: slice) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, part] * S[part]) @ Vh[part]


def test_lora_is_kaiming_uniform_and_zero(make) -> None:
    for _, A, B, _, name in started(make, "lora"):
        bound = 1 / math.sqrt(A.shape[1])
        assert 0.9 * bound < A.abs().max() <= bound, name
        assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.2), name
        assert not B.any(), name


def test_gaussian_is_normal_and_zero(make) -> None:
    started_layers = list(started(make, "gaussian"))
    every = torch.cat([A.flatten() for _, A, *_ in started_layers])
    assert every.std() == pytest.approx(1 / R, rel=0.05)
    assert (every.abs() < 1 / R).float().mean() == pytest.approx(0.683, abs=0.04), "of a normal"
    assert not any(B.any() for _, _, B, *_ in started_layers)


def test_orthogonal_is_random_with_a_product_of_zero(make) -> None:
    for _, A, B, _, name in started(make, "orthogonal"):
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == R // 2, name
        assert (B @ A).norm() < 1e-5 * B.norm() * A.norm(), name


def test_a_randomized_svd_draws_other_numbers_with_another_seed(make) -> None:
    def state(init: str, seed: int) -> dict[str, torch.Tensor]:
        cell = make(f"init={init}", f"seed={seed}")
        return load_file(train(cell).folder(cell.chain.prepare) / "state" / "adapter_model.safetensors")

    exact, first, second = state("pissa", 0), state("pissa_niter_16", 0), state("pissa_niter_16", 1)
    assert all(not torch.equal(A, second[name]) and not torch.equal(A, exact[name]) for name, A in first.items())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_takes_the_largest_singular_values(make, init: str) -> None:
    for W, A, B, s, name in started(make, init):
        taken, best = s * B @ A, truncated(W, slice(None, R)).float()
        if init == "pissa":
            assert (taken - best).norm() < 1e-4 * W.norm(), name
        else:  # randomized: W on r directions of one side, and nearly as much of it
            left, right = (torch.linalg.qr(x)[0] for x in (B, A.T))
            gap = min((taken - left @ left.T @ W).norm(), (taken - W @ right @ right.T).norm())
            assert gap < 1e-4 * W.norm(), name
            assert taken.norm() > 0.9 * best.norm(), name


def test_milora_takes_the_smallest_singular_values(make) -> None:
    for W, A, B, s, name in started(make, "milora"):
        minor = truncated(W, slice(-R, None))
        assert minor.norm() > 1e-4 * W.norm()
        assert (s * B @ A - minor).norm() < 1e-5 * W.norm(), name


@pytest.mark.parametrize("init", ["milora", "loftq"])
def test_layers_that_keep_their_weight_transposed_start_alike(init: str) -> None:
    if init == "loftq":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    plain = logits(base.eval())
    start = Start(Lora(r=R, alpha=8), init_of(init)())
    wrapped = fresh(base, start)
    prepare(wrapped, start, [], lambda done, total: None)
    assert len(layers(wrapped)) == 4, "GPT-2's Conv1D"
    weights = {name: layer.get_base_layer().weight.T for name, layer in layers(wrapped).items()}
    for name, layer in layers(wrapped).items():
        W, taken = weights[name], layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # fmt: skip
        if init == "milora":
            assert (taken - truncated(W, slice(-R, None))).norm() < 1e-5 * W.norm(), name
        else:
            Q = nf4(W)
            assert (taken - truncated(W - Q, slice(None, R))).norm() < 1e-5 * W.norm(), name
            with quantized(wrapped):
                assert torch.equal(layer.get_base_layer().weight, Q.T), name
        assert torch.equal(layer.get_base_layer().weight.T, W)
    assert (logits(wrapped) - plain).abs().max() < 1e-4 or init == "loftq"


def test_olora_is_orthonormal(make) -> None:
    for W, A, B, _, name in started(make, "olora"):
        assert torch.allclose(B.T @ B, torch.eye(R), atol=1e-5), name
        assert torch.allclose(A, B.T @ W, atol=1e-5), name
        assert torch.allclose(B @ B.T @ W[:, :R], W[:, :R], atol=1e-5), "B spans the first columns"
        assert torch.allclose(A[:, :R].tril(-1), torch.zeros(R, R), atol=1e-5), name


def test_multilora_has_parallel_modules_with_scales_that_are_learned(make) -> None:
    cell = make("init=multilora", "init.modules=2")
    store, base = train(cell), of(cell)
    with attach.adapter(base, start_of(cell), None) as wrapped:
        for layer in layers(wrapped).values():
            assert not layer.lora_scale["default"].any()
            assert layer.lora_scale["default"].shape == (2, layer.out_features)
            largest = layer.lora_B["default"].weight.abs().max()
            assert 0.5 / math.sqrt(R / 2) < largest <= 1 / math.sqrt(R / 2), (
                "Kaiming-uniform for a fan-in of r / modules"
            )
    state = load_file(store.folder(cell.chain.adapt) / "state" / "adapter_model.safetensors")
    scales = [t for name, t in state.items() if "lora_scale" in name]
    assert len(scales) == LAYERS
    assert all(t.any() for t in scales)


def test_rslora_is_scaled_by_the_root_of_the_rank(make) -> None:
    for *_, s, name in started(make, "rslora"):
        assert s == 8 / math.sqrt(R), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dora_s_magnitudes_start_as_the_norms_of_the_base_s_rows_and_are_trained(make, dtype: str) -> None:
    cell = make("init=dora", f"model.dtype={dtype}")
    store, base = train(cell), of(cell)
    saved = load_file(store.folder(cell.chain.adapt) / "adapter" / "adapter_model.safetensors")
    with attach.adapter(base, start_of(cell), None) as wrapped:
        for name, layer in layers(wrapped).items():
            magnitude = layer.lora_magnitude_vector["default"].weight.detach()
            norms = layer.get_base_layer().weight.float().norm(dim=1)
            assert torch.allclose(magnitude, norms, rtol=1e-6), name
            moved = (saved[f"{name}.lora_magnitude_vector"] - magnitude).abs()
            assert 0 < moved.max() < 0.01, name


@pytest.mark.parametrize("init", VARIANTS)
def test_a_variant_goes_on_training_what_its_warm_up_left(make, init: str) -> None:
    cell = make(f"init={init}", m=8)
    store = train(cell)
    before, after = (load_file(store.folder(s) / "adapter" / "adapter_model.safetensors") for s in (cell.chain.warmup, cell.chain.adapt))  # fmt: skip
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert 0 < (weight - before[name]).abs().max() < 0.01, name


@pytest.mark.parametrize("init", VARIANTS)
def test_a_variant_is_evaluated_merged_where_that_is_the_same_model(make, tiny: Path, init: str) -> None:
    cell = make(f"init={init}", m=8)
    folder = train(cell).folder(cell.chain.adapt)
    with attach.trained(of(cell), folder / "adapter") as (tested, changes):
        assert changes
        assert not layers(tested), "merged"
        assert (logits(tested) - logits(original(tiny, folder))).abs().max() < 1e-4


@pytest.mark.parametrize("init", VARIANTS)
def test_a_variant_computes_what_peft_computes(make, tiny: Path, init: str) -> None:
    """PEFT's own layers, loaded as anyone would, in training: the same outputs and the same gradients, with dropout too."""
    cell = make(f"init={init}", "recipe.lora.dropout=0.5", "recipe.micro_batch=2", m=8)
    folder = train(cell).folder(cell.chain.warmup)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), folder / "adapter", is_trainable=True
    )
    with attach.adapter(of(cell), start_of(cell), folder) as ours, attach.in_training(ours):
        losses = []
        for wrapped in (ours, theirs):
            torch.manual_seed(0)
            losses.append(wrapped.train()(input_ids=IDS, labels=IDS).loss)
            losses[-1].backward()
        expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
        assert torch.equal(*losses)
        assert expected.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
        for name, weight in ours.named_parameters():
            assert not weight.requires_grad or torch.allclose(weight.grad, expected[name], rtol=1e-4, atol=1e-7), name


def looked_at(cell: Cell, samples: int = 8) -> list[dict]:
    """The rows that a preparation saw."""
    run, length = running(cell, cell.chain.prepare), cell.config.recipe.max_length
    if cell.config.init.data == "general":
        return data.sft_examples(rows.general(run, samples, length).examples)
    return data.sft_examples(rows.task(run, samples, length, preference=False).examples)


def inputs_of_layers(cell: Cell, answers_only: bool) -> list[dict[str, torch.Tensor]]:
    """What goes into each linear layer, a mapping (tokens, in) a row."""
    base, found = of(cell), []
    for row in looked_at(cell):
        seen: dict[str, torch.Tensor] = {}
        wanted = torch.tensor(row["labels"]) != -100 if answers_only else slice(None)
        handles = [
            module.register_forward_hook(
                lambda m, i, o, name=name, seen=seen, wanted=wanted: seen.update({name: i[0][0][wanted].double()})
            )
            for name, module in base.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.inference_mode():
            base.model(input_ids=torch.tensor([row["input_ids"]]))
        for handle in handles:
            handle.remove()
        found.append(seen)
    return found


@pytest.mark.parametrize(("init", "part"), [("corda_ipm", slice(None, R)), ("corda_kpm", slice(-R, None))])
def test_corda_s_directions_are_those_of_the_inputs_covariance(make, init: str, part: slice) -> None:
    rows = inputs_of_layers(make(f"init={init}"), answers_only=False)
    for W, A, B, s, name in started(make, init):
        scaled = [x / x.max().abs() for x in (row[name] for row in rows)]
        covariance = sum(x.T @ x for x in scaled) / len(rows)
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        expected = truncated(W.double() @ covariance, part)
        assert (s * B.double() @ A.double() @ covariance - expected).norm() < 1e-2 * expected.norm(), name


def test_eva_s_directions_are_those_of_the_inputs(make) -> None:
    rows = inputs_of_layers(make("init=eva"), answers_only=True)
    ranks = []
    for _, A, B, _, name in started(make, "eva"):
        x = torch.cat([row[name] for row in rows])
        x -= x.mean(0)
        best = torch.linalg.svdvals(x)[: len(A)].square().sum()
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-4), name
        assert (x @ A.double().T).square().sum() > 0.95 * best, name
        assert not B.any()
        ranks.append(len(A))
    assert sum(ranks) == R * LAYERS
    assert len(set(ranks)) > 1, "ranks go where the variance is explained"


def test_lora_ga_s_directions_are_those_of_the_gradient(make, tiny: Path) -> None:
    rows = looked_at(make("init=lora_ga"))
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        (plain(input_ids=ids, labels=labels).loss / len(rows)).backward()
    for _, A, B, _, name in started(make, "lora_ga"):
        U, _, Vh = torch.linalg.svd(plain.get_submodule(name).weight.grad)
        size = len(B) ** 0.25 / 16**0.5
        assert torch.allclose((A @ Vh[:R].T / size).square().sum(1), torch.ones(R), atol=1e-2), name
        assert torch.allclose((B.T @ U[:, R : 2 * R] / size).square().sum(1), torch.ones(R), atol=1e-2), name


@pytest.mark.parametrize("init", PREPARED)
def test_d2lora_keeps_training_the_adapter_that_was_prepared(make, init: str) -> None:
    cell = make(f"init={init}", m=8)
    store, before = train(cell), None
    for stage in (cell.chain.prepare, cell.chain.warmup, cell.chain.adapt):
        place = store.folder(stage)
        state = load_file((place / "state" if init in MOVING else place / "adapter") / "adapter_model.safetensors")
        start = load_file(place / "state" / "start.safetensors") if init in MOVING else {}
        if before is not None:
            assert start.keys() == before[1].keys()
            assert all(torch.equal(start[k], before[1][k]) for k in start), "its start is kept"
            for name, weight in state.items():
                step = (weight - before[0][name]).abs().max()
                assert 0 < step < 0.01, (name, float(step))
        before = (state, start)


def test_an_adapter_is_the_same_bit_for_bit_whatever_was_before(make, tmp_path: Path) -> None:
    """In the shared output each came after others of its kind (or comes now), in the second each comes after another init."""

    def adapter(init: str, *output: str) -> dict[str, torch.Tensor]:
        cell = make(f"init={init}", "method=dpo", *output, m=8 if "pissa" in init else 0)
        return load_file(train(cell).folder(cell.chain.adapt) / "adapter" / "adapter_model.safetensors")

    several = ["pissa_niter_16", "olora", *LOFTQ, "lora_ga", "corda_ipm", "eva", "multilora", "dora"]
    forth = {init: adapter(init) for init in several}
    back = {init: adapter(init, f"output={tmp_path}") for init in reversed(several)}
    for init, weights in forth.items():
        assert all(torch.equal(weight, back[init][name]) for name, weight in weights.items()), init


@pytest.mark.parametrize("init", ["corda_ipm", "lora_ga"])
def test_a_preparation_that_is_interrupted_leaves_nothing_to_those_after_it(make, tmp_path: Path, init: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise RuntimeError("interrupted")

    def prepared(output: str) -> dict[str, torch.Tensor]:
        other = make("init=eva", f"output={tmp_path / output}")
        return load_file(train(other).folder(other.chain.prepare) / "adapter" / "adapter_model.safetensors")

    cell = make(f"init={init}", f"output={tmp_path / 'failed'}")
    linear = [m for m in of(cell).model.modules() if isinstance(m, torch.nn.Linear)]
    fresh, before = prepared("fresh"), [set(vars(m)) for m in linear]
    config = cell.config.model_copy(update={"job": [cell.chain.prepare.key]})
    assert worker.do(config, cell, Store(Outputs.of(config).root), lambda stage: interrupt) == [cell.chain.prepare]
    assert not any(m._forward_hooks or m._backward_hooks for m in linear)
    assert [set(vars(m)) for m in linear] == before
    after = prepared("after")
    assert all(torch.equal(weight, after[name]) for name, weight in fresh.items())


# --- silent fall-backs are errors ----------------------------------------------------------------------------------


def failure(cell: Cell) -> str:
    """What the preparation's failure says; the base is whole afterwards."""
    store = Store(Outputs.of(cell.config).root)
    lost = worker.do(cell.config, cell, store, lambda stage: lambda done, total: None)
    stage: Stage = cell.chain.prepare
    assert stage in lost
    of(cell).check()
    assert not layers(of(cell).model)
    return json.loads(Outputs.of(cell.config).failed(stage.key).read_text())["error"]


def test_a_layer_that_eva_has_no_directions_for_is_an_error(make, tmp_path: Path, monkeypatch) -> None:
    plain = eva.get_eva_state_dict
    monkeypatch.setattr(eva, "get_eva_state_dict", lambda *a, **k: dict(list(plain(*a, **k).items())[1:]))
    assert "EVA has no directions for" in failure(make("init=eva", f"output={tmp_path}"))


def test_lora_ga_without_gradients_is_an_error(make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lora_ga, "preprocess_loraga", lambda *a, **k: None)
    assert "LoRA-GA has no gradient of" in failure(make("init=lora_ga", f"output={tmp_path}"))


def test_too_few_tokens_for_eva_are_refused_instead_of_going_round_for_ever(make, tmp_path: Path) -> None:
    said = failure(make("init=eva", f"output={tmp_path}", "recipe.lora.r=16", "init.samples=1"))
    assert said.startswith("init=eva: 1 rows have ")
    assert "answer tokens, fewer than r * rho = 32: take more of them (n, init.samples)" in said


def test_a_last_row_with_few_tokens_does_not_keep_eva_from_starting(make, tmp_path: Path) -> None:
    cell = make("init=eva", f"output={tmp_path}", "recipe.lora.r=16", "init.samples=9", "n=9")
    assert 0 < eva.answer_tokens(looked_at(cell, 9)[8:]) < 32
    train(cell)


@pytest.mark.parametrize(
    ("answers", "sizes"),
    [
        ([9] * 20, [8, 8, 4]),  # each has enough
        ([9] * 19 + [0], [8, 8, 4]),
        ([9] * 17, [8, 9]),  # the last has not
        ([1] * 8 + [9] * 8, [10, 6]),  # the first has not
        ([1] * 35, [35]),
        ([32], [1]),
    ],
)
def test_each_batch_of_eva_s_has_enough_tokens_and_eight_rows_where_these_have(answers: list, sizes: list) -> None:
    rows = [{"labels": [-100, *[5] * answer]} for answer in answers]
    batches = eva.batches(rows, 18)
    assert [len(batch) for batch in batches] == sizes
    assert [row for batch in batches for row in batch] == rows


@pytest.mark.parametrize(("init", "r"), [("pissa", 33), ("lora_ga", 17), ("eva", 17)])
def test_a_rank_that_the_layers_do_not_have_is_refused(make, tmp_path: Path, init: str, r: int) -> None:
    assert failure(make(f"init={init}", f"output={tmp_path}", f"recipe.lora.r={r}")).startswith(f"recipe.lora.r={r}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init=unknown_one"], ["unknown_one"]),
        (["init.name=lora_gb"], ["init.name=lora_gb", "lora_ga"]),
        (
            ["init.name=corda_kpm"],
            ["init.data: missing with init=corda_kpm, which takes data, samples", "init.samples"],
        ),
        (
            ["init=lora", "+init.samples=3"],
            ["init.samples: there is no such key with init=lora, which takes no settings"],
        ),
        (["init=eva", "init.data=all"], ["init.data=all", "general", "task"]),
        (["init=eva", "init.rho=0.5"], ["init.rho=0.5", "greater than or equal to 1"]),
        (["init=eva", "m=8", "n=0"], ["init.data=task", "n=0", "general"]),
        (["init=pissa", "recipe.lora.dropout=0.1"], ["recipe.lora.dropout=0.1", "pissa"]),
        (["init=orthogonal", "recipe.lora.r=3"], ["recipe.lora.r=3", "multiple of 2"]),
        (
            ["init=loftq", "recipe.lora.target_modules=[q_proj,v_proj]"],
            ["recipe.lora.target_modules=", "q_proj", "must be all-linear", "loftq"],
        ),
        (["init=multilora", "recipe.lora.r=6"], ["recipe.lora.r=6", "multiple of 4"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (ours, or Hydra's for an unknown group)
        composing.cell(*overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    if not overrides[0].endswith("unknown_one"):
        assert isinstance(caught.value, UserError)
        assert "\n" not in message


def test_each_initialization_that_computes_something_has_a_preparation_and_no_other() -> None:
    assert set(PREPARATIONS) == {init for init in CLASSES if init.prepared}


# --- the plan ------------------------------------------------------------------------------------------------------


def test_one_preparation_serves_every_cell_that_starts_from_it(cell) -> None:
    configs = [cell("init=pissa", f"method={method}").config for method in ("sft", "dpo")]
    grid = [c for config in configs for c in made.cells(config, m=(0, 8), n=(8, 16), seed=(0, 1))]
    assert len(grid) == 16
    assert len({c.chain.prepare.key for c in grid}) == 1
    assert len({c.chain.warmup.key for c in grid if c.chain.warmup}) == 2, "one a seed"
    seeded = [cell("init=lora_ga", f"seed={s}").chain.prepare.key for s in (0, 1)]
    assert len(set(seeded)) == 2, "its SVD draws random numbers"


def test_what_can_change_a_preparation_changes_its_key(cell) -> None:
    def key(*overrides: str) -> str:
        return cell("init=eva", *overrides).chain.prepare.key

    changes = ["n=8", "init.samples=16", "init.rho=1", "recipe.lora.r=8", "recipe.lora.alpha=8", "data_seed=1", "init.data=general", "recipe.max_length=128", "model.dtype=bfloat16"]  # fmt: skip
    assert len({key(), *map(key, changes)}) == 1 + len(changes)
    assert key() == key("method=dpo") == key("recipe.lr.sft=1e-4") == key("n=500") == key("seed=2")


def test_a_preparation_never_sees_rows_that_the_cell_does_not_have(make) -> None:
    cell = make("init=eva", "init.samples=64")
    store = train(cell)
    prepared, adapted = (store.record(s).data for s in (cell.chain.prepare, cell.chain.adapt))
    assert prepared == adapted, "its own 8 rows"
    assert cell.chain.prepare.spec.rows["samples"] == 8


def test_a_preparation_looks_at_all_rows_where_the_task_has_fewer_than_it_takes(make, tmp_path: Path) -> None:
    rows = data.rows(make().config.task.data)[:6]
    rows[0] = rows[0] | {"prompt": "much too long " * 200}
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = make("init=eva", "n=all", f"task.data.path={tmp_path / 'few.jsonl'}", "init.samples=64")
    store = train(cell)
    prepared, adapted = (store.record(s).data for s in (cell.chain.prepare, cell.chain.adapt))
    assert prepared == adapted
    assert prepared.samples == 5


def test_the_base_needs_no_preparation_and_is_evaluated_once_for_all_inits(cell) -> None:
    keys = set()
    for init in ("lora", "pissa", "eva"):
        chain = cell(f"init={init}", "n=0", "m=0").chain
        assert chain.prepare is None
        keys.add(tuple(s.key for s in chain.evaluations))
    assert len(keys) == 1


def test_general_rows_that_an_init_looks_at_are_checked_against_the_tests(cell) -> None:
    names = [s.label for s in cell("init=eva", "init.data=general", "m=0", "n=8").chain.contamination]
    assert any("lab / lab_math" in name for name in names)


def test_preparations_go_first_and_what_needs_them_is_not_started_without(cell) -> None:
    grid = [cell(f"init={i}", f"m={m}", "n=8") for i in ("lora", "pissa") for m in (0, 8)]
    batches = plan.batches(grid, set())
    where = {s.key: number for number, jobs in enumerate(batches) for job in jobs for s in job.stages}
    for one in grid:
        for stage in one.chain.results:
            inside = any(stage in job.stages and stage.parent in job.stages for jobs in batches for job in jobs)
            assert stage.parent is None or inside or where[stage.parent.key] < where[stage.key]
    blocked = [j for jobs in batches[1:] for j in jobs if j.cell.config.init.name == "pissa" and j.waits_for]
    assert {s.kind for j in blocked for s in j.waits_for} == {"prepare", "warmup"}


# --- LoftQ: starts from another base -------------------------------------------------------------------------------


def test_loftq_without_bitsandbytes_is_refused_before_anything_is_loaded(cell, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="init=loftq: needs bitsandbytes"):
        preflight.check_inputs(cell("init=loftq").config, set())


def test_loftq_has_no_base_for_a_reference(cell) -> None:
    with pytest.raises(UserError, match=r"method.reference=base.*warm_start"):
        cell("init=loftq", "method=dpo", "method.reference=base")


def test_too_few_general_rows_are_refused_before_anything_is_loaded(cell) -> None:
    with pytest.raises(UserError, match=r"init.samples=90000: warmup=lab has 44,000 rows"):
        preflight.check_inputs(cell("init=eva", "init.data=general", "init.samples=90000").config, set())


@pytest.fixture
def loftq(make) -> Callable[..., Cell]:
    pytest.importorskip("bitsandbytes", reason="LoftQ needs bitsandbytes: pip install -e '.[loftq]'")
    return functools.partial(make, "init=loftq")


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (64, 128), (3, 50)])
def test_a_quantized_weight_is_nf4_in_blocks_of_64(loftq, shape: tuple[int, int]) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    W, levels = torch.randn(shape), bnb.get_4bit_type("nf4", device="cpu")
    blocks = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)] * largest
    assert torch.allclose(nf4(W).flatten(), nearest.flatten()[: W.numel()], atol=1e-6)


def test_loftq_is_nearer_to_the_base_than_the_quantized_base_is(loftq) -> None:
    cell = loftq()
    store, base = train(cell), of(cell)
    weights = {name: m.weight.detach().clone() for name, m in base.model.named_modules() if hasattr(m, "weight")}
    with attach.adapter(base, start_of(cell), store.folder(cell.chain.prepare)) as wrapped:
        for name, layer in layers(wrapped).items():
            W, Q = weights[name.removeprefix("base_model.model.")], layer.get_base_layer().weight
            assert 0 < (W - Q - layer.get_delta_weight("default")).norm() < (W - Q).norm() < 0.2 * W.norm(), name


@pytest.mark.parametrize("m", [0, 8])
@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_loftq_continues_on_its_quantized_base(loftq, tiny: Path, method: str, m: int) -> None:
    cell = loftq(f"method={method}", m=m)
    store, base = train(cell), of(cell)
    before = logits(base.model)
    for stage in [s for s in (cell.chain.prepare, cell.chain.warmup, cell.chain.adapt) if s]:
        with attach.adapter(base, start_of(cell), store.folder(stage)) as wrapped:
            continued = logits(wrapped)
        with attach.trained(base, store.folder(stage) / "adapter", "loftq") as (tested, _):
            assert (logits(tested) - continued).abs().max() < 1e-4
        assert (continued - before).abs().max() > 1e-4, "not the base itself"
    assert torch.equal(logits(base.model), before), "the base is put back"
    if method == "dpo":
        first = store.record(cell.chain.adapt).metrics["first_loss"]
        assert first == pytest.approx(math.log(2), abs=1e-5)


def test_loftq_s_untrained_cell_is_a_baseline_of_its_own(loftq, cell) -> None:
    chain = loftq("n=0").chain
    assert chain.evaluations[0].parent == chain.prepare == chain.adapter
    assert chain.prepare.key != chain.evaluations[0].key
    assert cell("n=0").chain.evaluations[0].parent is None
