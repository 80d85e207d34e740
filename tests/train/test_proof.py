"""Exact or not done: layouts are proven, the base is put back, and what is saved is what was trained."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families
from configurations import configurations, tiny

from d2lora.adapters import attach, coverage, saving
from d2lora.adapters.coverage import layers
from d2lora.adapters.preparations import prepare
from d2lora.adapters.start import Start
from d2lora.base import Base, read_base
from d2lora.errors import UserError
from d2lora.layouts import choice, packing, proof
from d2lora.layouts.families import Reach
from d2lora.layouts.packing import Layout
from d2lora.settings import Lora, Model, PlainInit, init_of

CONFIGURATIONS = configurations()
PLAIN = Layout("single", "whole")
START = Start(Lora(r=4, alpha=4), PlainInit())


@pytest.fixture(scope="module")
def settings():
    return families.recipe()


@pytest.fixture
def load(tmp_path: Path):
    """load(name or config) -> the base, as a run loads it."""

    def make(what, dtype: str = "float32") -> Base:
        config = CONFIGURATIONS[what]() if isinstance(what, str) else what
        families.loaded("it", config, tmp_path)
        return read_base(Model(name="it", path=str(tmp_path / "model"), dtype=dtype), tmp_path)

    return make


def layout(trained: tuple) -> str:
    return trained[0]["layout"]["layout"]


def test_a_layout_that_is_wrong_is_not_used_and_one_line_says_so(load, settings, tmp_path, monkeypatch, capsys) -> None:
    """The whole row sees itself: as if nobody had thought of the border between two texts."""
    whole = lambda rows, *_: torch.ones(rows["ids"].shape[0], 1, *[rows["ids"].shape[1]] * 2).tril().bool()  # noqa: E731
    base, settings = load("llama"), settings.model_copy(update={"attention": "sdpa"})
    monkeypatch.setattr(packing, "attention", whole)
    monkeypatch.setattr(choice, "_said", set())
    metrics, start, found = families.trained(base, "dpo", tmp_path / "found", settings)
    _, _, right = families.trained(base, "dpo", tmp_path / "right", settings, PLAIN)
    assert metrics["layout"]["layout"] == "padded"
    assert families.distance(found, right, start) < 1e-3
    assert "it: texts are laid padded (packed: a token's log-probability is off by" in capsys.readouterr().err


def test_a_window_that_is_not_applied_is_seen_in_bfloat16_too(load, settings, tmp_path, monkeypatch) -> None:
    """A difference below bfloat16's rounding would be missed on the model itself; a small copy in float32 shows it."""
    base = load(tiny("mistral", sliding_window=24), "bfloat16")
    assert layout(families.trained(base, "sft", tmp_path / "right", settings)) == "packed"
    monkeypatch.setattr("d2lora.layouts.families.reaches", lambda config: {"": Reach()})
    assert layout(families.trained(base, "sft", tmp_path / "wrong", settings)) == "padded"


def test_attention_by_text_is_proven_in_bfloat16_too(load, settings, tmp_path) -> None:
    settings = settings.model_copy(update={"attention": "by_text"})
    metrics, *_ = families.trained(load("llama", "bfloat16"), "dpo", tmp_path / "it", settings)
    assert (metrics["attention"], metrics["layout"]["layout"]) == ("by_text", "packed")


def test_a_model_that_nothing_is_exact_for_is_refused(load, settings, tmp_path, monkeypatch) -> None:
    said = packing.log_probs

    def off(*args):
        found = said(*args)
        return replace(found, log_probs=found.log_probs + 0.01)

    monkeypatch.setattr(packing, "log_probs", off)
    with pytest.raises(
        UserError, match=r"model=it: no layout of its rows .*packed: a token's log-probability is off by 0.01"
    ):
        families.trained(load("llama"), "sft", tmp_path / "it", settings)


def test_a_proof_is_remembered_up_to_the_length_it_was_shown_for(tmp_path) -> None:
    memory, other = (proof.Memory(tmp_path, {"content": name}) for name in "ab")
    exact, wrong = proof.Proof("packed", 100, 1e-6, 1e-3, True), proof.Proof("padded", 100, 0.5, 1e-3, False)
    memory.put("packed", 4, exact)
    memory.put("padded", 4, wrong)
    assert memory.get("packed", 4, 100) == memory.get("packed", 4, 7) == exact
    assert memory.get("packed", 4, 101) is None, "longer than it was shown for"
    assert memory.get("padded", 4, 101) == wrong
    assert memory.get("padded", 4, 99) is None, "a shorter text may fit the window"
    assert memory.get("packed", 5, 100) is other.get("packed", 4, 100) is None


def test_a_base_s_own_dropout_is_off_whatever_the_layout_and_whoever_trained_before(load, settings, tmp_path) -> None:
    config = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    base = load(config)
    _, start, first = families.trained(base, "sft", tmp_path / "first", settings)
    families.trained(base, "dpo", tmp_path / "dpo", settings)
    ways = {
        "after DPO": settings,
        "micro-batch": settings.model_copy(update={"micro_batch": 1}),
        "padded": settings.model_copy(update={"packing": "padded"}),
    }
    for name, how in ways.items():
        _, _, found = families.trained(base, "sft", tmp_path / name, how)
        assert families.distance(found, first, start) < 1e-3, name


def test_a_router_s_own_loss_is_off_and_the_base_s_settings_are_put_back(load, settings, tmp_path) -> None:
    base = load("qwen3_moe aux loss")
    before = base.model.config.to_dict()
    assert not before["output_router_logits"]
    for method in families.METHODS:
        _, start, found = families.trained(base, method, tmp_path / method, settings)
        _, _, right = families.trained(base, method, tmp_path / f"{method} plain", settings, PLAIN)
        assert families.distance(found, right, start) < 1e-3
        assert base.model.config.to_dict() == before
    prompt = torch.tensor([[1, 5, 7]])
    assert base.model.generate(prompt, max_new_tokens=2).shape == (1, 5)


def test_a_start_that_fails_leaves_no_layer_on_the_base(load) -> None:
    base = load("mixtral")
    for changes in (
        {"dropout": 0.1},
        {"target_modules": ["nope"]},
        {"target_modules": ["q_proj", "nope"]},  # PEFT would adapt q_proj alone, and say nothing
    ):  # PEFT's experts take no dropout: it fails half-way
        start = replace(START, lora=START.lora.model_copy(update=changes))
        with pytest.raises(UserError, match=r"recipe.lora.target_modules="), attach.adapter(base, start, None):
            pass
        assert not any(isinstance(module, BaseTunerLayer) for module in base.model.modules())
    with attach.adapter(base, START, None) as wrapped:
        assert layers(wrapped)


@pytest.mark.parametrize(
    "name", ["multilora", "orthogonal", "rslora", "dora", "pissa", "olora", "milora", "corda_kpm", "eva", "lora_ga"]
)
def test_an_initialization_that_cannot_start_experts_is_refused_in_one_line(load, name: str) -> None:
    from_rows = {"data": "task", "samples": 8}
    settings = {"multilora": {"modules": 2}, "corda_kpm": from_rows, "eva": from_rows | {"rho": 2}}
    settings["lora_ga"] = from_rows | {"direction": "ArB2r", "gamma": 16}
    init = init_of(name).model_validate(settings.get(name, {}))
    with pytest.raises(UserError, match=f"init={name}: starts linear layers only, and all-linear takes parameters of ") as refused, attach.adapter(load("mixtral"), replace(START, init=init), None):  # fmt: skip
        pass
    assert "\n" not in str(refused.value)


def test_dora_starts_as_the_base_on_turned_weights_and_is_read_again(load, tmp_path: Path) -> None:
    """GPT-2's Conv1D has its weight as (in, out)."""
    base, start = load("gpt2"), replace(START, init=init_of("dora")())
    ids = torch.arange(20, 44)[None]
    with torch.inference_mode():
        plain = base.model(input_ids=ids).logits
    with attach.adapter(base, start, None) as wrapped:
        with torch.inference_mode():
            assert torch.equal(wrapped(input_ids=ids).logits, plain)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                torch.nn.init.normal_(weight, std=0.05)
        saved = attach.save(base, wrapped, tmp_path)
    attach.check_saved(base, saved, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "magnitude" not in k}, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="the saved adapter is not the trained one: 16 of 16 layers differ"):
        attach.check_saved(base, saved, tmp_path)


def test_an_embedding_is_refused_in_one_line(load) -> None:
    base, lora = load("llama"), START.lora
    for names in (["embed_tokens"], ["q_proj", "embed_tokens"]):
        start = replace(START, lora=lora.model_copy(update={"target_modules": names}))
        with pytest.raises(UserError, match=r"target_modules=.*: model.embed_tokens is an embedding: name linear layers, for example"), attach.adapter(base, start, None):  # fmt: skip
            pass


@pytest.mark.parametrize("name", ["pissa", "olora", "milora"])
def test_a_layer_with_turned_weights_starts_as_a_linear_one_does(load, name: str) -> None:
    """GPT-2's Conv1D has its weight as (in, out)."""
    base = load("gpt2")
    start = replace(START, init=init_of(name)())
    with attach.adapter(base, start, None) as wrapped:
        prepare(wrapped, start, [], lambda done, total: None)
        layer = next(iter(layers(wrapped).values()))
        start = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        weight = layer.get_base_layer().weight.T
    U, S, Vh = torch.linalg.svd(weight)
    Q, R = torch.linalg.qr(weight)
    right = {
        "pissa": U[:, :4] * S[:4] @ Vh[:4],
        "milora": U[:, : len(S)][:, -4:] * S[-4:] @ Vh[: len(S)][-4:],
        "olora": Q[:, :4] @ R[:4],
    }
    assert torch.allclose(start, right[name], atol=1e-4)


def test_an_adapter_that_is_not_read_again_whole_is_refused_before_it_is_trained(
    load, settings, tmp_path, monkeypatch
) -> None:
    save = saving.save

    def without_a_layer(wrapped, record: Path) -> None:
        save(wrapped, record)
        file = record / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({k: t for k, t in tensors.items() if "layers.1.mlp.up_proj" not in k}, file, {"format": "pt"})

    monkeypatch.setattr(saving, "save", without_a_layer)
    base = load("llama")
    with pytest.raises(
        UserError, match=r"target_modules=all-linear: .* 1 of 28 layers differ.*up_proj: name layers that"
    ):
        families.trained(base, "sft", tmp_path / "it", settings)
    with attach.adapter(base, START, None) as wrapped:
        saved = attach.save(base, wrapped, tmp_path / "record")
    with pytest.raises(RuntimeError, match="the saved adapter is not the trained one: 1 of 28 layers differ"):
        attach.check_saved(base, saved, tmp_path / "record")


def test_coverage_says_what_an_adapter_reaches_and_what_not(load) -> None:
    with attach.adapter(load("deepseek_v3"), START, None) as wrapped:
        found = coverage.of(wrapped)
    assert "model.layers.*.mlp.experts.gate_up_proj" in found.adapted
    assert {"model.embed_tokens", "lm_head", "model.layers.*.mlp.shared_experts.up_proj"} <= found.left_out.keys()
    assert found.share + sum(found.left_out.values()) == pytest.approx(1, abs=0.01)


def test_a_vision_tower_is_left_out(load) -> None:
    with attach.adapter(load("gemma3 multimodal sw8"), START, None) as wrapped:
        assert all("vision" not in name for name in layers(wrapped))
        assert any("vision" in name for name in coverage.of(wrapped).left_out)
