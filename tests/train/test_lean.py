"""What replaces a model's layers in training computes what they compute, with fewer operations and less to save."""

import weakref

import pytest
import torch
from doing import alone, do
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.autograd import gradcheck
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from d2lora.adapters.coverage import layers
from d2lora.adapters.decoder import After, AfterAttention, Before, BeforeAttention, ShortAttention, WithShortAttention
from d2lora.adapters.flat import Flat
from d2lora.adapters.layers import ADAPTER, Residual, matrices
from d2lora.adapters.lean import lean
from d2lora.adapters.parts import GatedMlp, Mlp, Norm, RmsNorm, Rotary
from d2lora.adapters.products import Adapted, Project, SharedInput
from d2lora.adapters.start import Start, fresh
from d2lora.layouts.rotary import Angles
from d2lora.settings import Lora, init_of

IDS = torch.arange(48).view(2, 24) % 50


def model(dtype: torch.dtype = torch.float32, **lora: object) -> PeftModel:
    """Return a random Llama with grouped heads and an adapter that is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    init = lora.pop("init", "lora")
    net = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    wrapped = fresh(
        net,
        Start(Lora(**({"r": 4, "alpha": 4} | lora)), init_of(init)(**({"modules": 2} if init == "multilora" else {}))),
    )
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
                weight.add_(torch.randn_like(weight), alpha=0.05)
    return wrapped.eval()


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def results(
    wrapped: PeftModel, autocast: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and the gradients of a loss."""
    wrapped.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = wrapped(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 3].mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.requires_grad}


def off(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two models' gradients, relative to the largest of its weight's."""
    return max(float((some[name] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for name, g in others.items())


def of_layers(wrapped: PeftModel, *names: str) -> SharedInput:
    """Return layers of the first decoder layer, ready for a pass."""
    group = SharedInput([Adapted(layers(wrapped)[f"base_model.model.model.layers.0.{name}"]) for name in names])
    weights = [weight for member in group.members for weight in (member.A, member.B)]
    group.join()
    group.set_up(torch.float64, Flat(sorted(weights, key=lambda weight: weight.shape[0] > 4)))
    for copy, matrix in group.copies():
        copy.copy_(matrix.detach())
    return group


@pytest.mark.parametrize("alpha", [4, 6])
def test_gradients_of_products_are_those_of_differences(alpha: int) -> None:
    wrapped = model(alpha=alpha).double()
    qkv = of_layers(wrapped, *(f"self_attn.{name}_proj" for name in "qkv"))
    o, down = of_layers(wrapped, "self_attn.o_proj"), of_layers(wrapped, "mlp.down_proj")
    mlp = Mlp(of_layers(wrapped, "mlp.gate_proj", "mlp.up_proj"), down)
    norm = Norm(torch.randn(64, dtype=torch.float64), 1e-6)
    before, after = Before(norm, qkv, (4, 2, 2)), After(o, norm, mlp)
    x, attended = double(1, 2, 64), double(1, 2, 4, 16)
    angles = Angles.of(double(1, 2, 16).detach(), double(1, 2, 16).detach())
    short = ShortAttention.of(double(1, 1, 2, 2).detach(), before.heads, 0.3)
    assert gradcheck(lambda x: Project.apply(x, qkv.anchor, qkv), x)
    assert gradcheck(lambda x: GatedMlp.apply(x, down.anchor, mlp), x)
    # Norms compute in float32, as Llama's.
    coarse = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-2, "nondet_tol": 1e-6}
    assert gradcheck(lambda x: BeforeAttention.apply(x, qkv.anchor, before, angles), x, **coarse)
    assert gradcheck(lambda a, x: AfterAttention.apply(a, x, o.anchor, after), (attended, x), **coarse)
    assert gradcheck(lambda x: WithShortAttention.apply(x, None, before, after, angles, short), x, **coarse)


def test_rotary_and_norm_are_llama_s() -> None:
    torch.manual_seed(0)
    q, k, cos, sin = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8), *torch.randn(2, 2, 7, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x = q.to(dtype).requires_grad_()
        expected = llama.apply_rotary_pos_emb(x, k.to(dtype), cos.to(dtype), sin.to(dtype))[0]
        found = Rotary.apply(x, Angles.of(cos.to(dtype), sin.to(dtype)))
        assert torch.equal(found, expected)
        g = torch.randn_like(found)
        assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (found, expected)))
        norm = llama.LlamaRMSNorm(8).to(dtype).requires_grad_(False)
        norm.weight.copy_(torch.randn(8))
        y = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
        assert torch.equal(y, norm(x))
        torch.testing.assert_close(*(torch.autograd.grad(z, x, g)[0] for z in (y, norm(x))))


@pytest.mark.parametrize("init", ["lora", "multilora", "rslora", "dora", "residual"])
def test_a_training_s_gradients_are_peft_s(init: str) -> None:
    wrapped = model(init="lora" if init == "residual" else init, alpha=6)
    if init == "residual":
        for layer in layers(wrapped).values():
            A, B = matrices(layer)
            layer.lora_variant[ADAPTER] = Residual(A.detach() + 0.1, B.detach() - 0.1)
    logits, gradients = results(wrapped)
    with lean(wrapped):
        ours, our_gradients = results(wrapped)
        with wrapped.disable_adapter(), torch.no_grad():
            base = wrapped(input_ids=IDS).logits
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert off(our_gradients, gradients) < 1e-4
    with wrapped.disable_adapter(), torch.no_grad():
        assert torch.equal(wrapped(input_ids=IDS).logits, base)
    assert not any("forward" in vars(module) for module in wrapped.modules()), "the model is as it was"
    assert llama.apply_rotary_pos_emb.__module__ == llama.__name__


@pytest.mark.parametrize(
    ("family", "whole"), [("mistral", True), ("qwen2", True), ("qwen3", False), ("gemma", False), ("granite", False)]
)
def test_layers_of_other_families_are_whole_where_their_code_is_llama_s(family: str, whole: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    net = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    wrapped = fresh(net, Start(Lora(r=4, alpha=4), init_of("lora")())).eval()
    for layer in layers(wrapped).values():
        torch.nn.init.normal_(matrices(layer)[1], std=0.05)
    logits, gradients = results(wrapped)
    with lean(wrapped):
        assert all(("forward" in vars(layer)) is whole for layer in net.model.layers)
        ours, our_gradients = results(wrapped)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert off(our_gradients, gradients) < 1e-4


def test_short_rows_attend_as_with_pytorch_s_kernel(monkeypatch) -> None:
    """Where a row's second half is a text of its own."""
    attends = torch.ones(24, 24, dtype=torch.bool).tril()
    attends[12:, :12] = False
    mask = torch.zeros(2, 1, 24, 24).masked_fill(~attends, float("-inf"))
    wrapped = model()
    logits, gradients = results(wrapped, mask=mask)
    with lean(wrapped):
        ours, our_gradients = results(wrapped, mask=mask)
        monkeypatch.setattr(WithShortAttention, "apply", None)
        with pytest.raises(TypeError):
            results(wrapped, mask=mask)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert off(our_gradients, gradients) < 1e-4


@pytest.mark.parametrize("part", ["self_attn", "mlp.down_proj", "self_attn.q_proj.lora_A.default"])
def test_a_hook_on_a_part_is_called(part: str) -> None:
    wrapped, calls = model(), []
    logits, gradients = results(wrapped)
    layer = wrapped.get_base_model().model.layers[0]
    layer.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    with lean(wrapped):
        ours, our_gradients = results(wrapped)
    assert calls == [part]
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert off(our_gradients, gradients) < 1e-4


def test_a_model_of_mixed_dtypes_computes_by_its_own_code() -> None:
    wrapped = model()
    wrapped.get_base_model().model.layers[1].self_attn.v_proj.get_base_layer().to(torch.bfloat16)
    logits, gradients = results(wrapped, autocast=True)
    with lean(wrapped):
        ours, our_gradients = results(wrapped, autocast=True)
    assert torch.equal(ours, logits)
    assert off(our_gradients, gradients) < 0.1  # of rounding in bfloat16


def saved(wrapped: PeftModel) -> int:
    """Return the bytes that autograd saves in a pass under autocast, each storage once, without weights."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results(wrapped, autocast=True)
    weights = {weight.untyped_storage().data_ptr() for weight in wrapped.parameters()}
    return sum(size for at, size in sizes.items() if at not in weights)


def test_with_bfloat16_rounding_differs_and_less_is_saved() -> None:
    """Nearer to float32 than PEFT's, which rounds once more."""
    exact, exact_gradients = results(model())
    wrapped = model(torch.bfloat16)
    with disable_input_dtype_casting(wrapped):
        logits, gradients = results(wrapped, autocast=True)
    before = saved(wrapped)
    with lean(wrapped):
        ours, our_gradients = results(wrapped, autocast=True)
        assert saved(wrapped) < 0.67 * before
    assert ours.dtype == logits.dtype
    assert {g.dtype for g in our_gradients.values()} == {torch.float32}
    assert float((ours - exact).abs().max()) < 1.5 * float((logits - exact).abs().max())
    assert off(our_gradients, exact_gradients) < 1.5 * off(gradients, exact_gradients)


def test_gradient_checkpointing_gives_the_same() -> None:
    wrapped = model()
    logits, gradients = results(wrapped)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped.enable_input_require_grads()
    for module in wrapped.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
    with lean(wrapped):
        ours, our_gradients = results(wrapped)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert off(our_gradients, gradients) < 1e-4


@pytest.mark.parametrize("lora", [{"dropout": 0.5}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}])
def test_layers_that_are_not_replaced_go_on_beside_those_that_are(lora: dict[str, object]) -> None:
    wrapped = model(**lora)
    logits, gradients = results(wrapped)  # in evaluation: dropout is not random
    with lean(wrapped):
        ours, our_gradients = results(wrapped)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert off(our_gradients, gradients) < 1e-4


def test_a_pass_that_fails_half_way_holds_no_memory_when_the_next_begins() -> None:
    """Of q, k and v, which are computed together, k and v are not taken here: without o's adapter, the layer is not one of ours."""
    wrapped, saved, held = model(target_modules=["q_proj", "k_proj", "v_proj"]), [], []
    layer = wrapped.get_base_model().model.layers[1].self_attn

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()
            saved.append(weakref.ref(self))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("here")

    with lean(wrapped):
        failing = layer.k_proj.register_forward_pre_hook(fail)
        with (
            torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor),
            pytest.raises(torch.OutOfMemoryError, match="here"),
        ):
            wrapped(input_ids=IDS)
        failing.remove()
        embedding = wrapped.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda *_: held.append(sum(one() is not None for one in saved)))
        wrapped(input_ids=IDS)
    assert saved
    assert held == [0]


def test_layers_that_are_wrong_are_not_trained_with(cell, tiny, tmp_path, monkeypatch, capsys) -> None:
    def losses(folder: str) -> list[float]:
        trained = alone(cell(f"model.path={tiny}", "method=sft", "n=8", "m=0", f"output={tmp_path / folder}"))
        metrics = do(trained).record(trained.chain.adapt).metrics
        return [metrics["first_loss"], metrics["last_loss"]]

    right = losses("right")
    assert "PEFT's own layers" not in capsys.readouterr().err
    monkeypatch.setattr(RmsNorm, "apply", staticmethod(lambda x, weight, eps: 1.5 * weight * x))
    assert losses("wrong") == pytest.approx(right, abs=1e-5)
    assert "trained by PEFT's own layers" in capsys.readouterr().err
