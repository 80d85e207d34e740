"""How an effective batch goes through the model: in which passes, with which attention, and what is refused."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from d2lora.errors import UserError
from d2lora.layouts import by_text, packing
from d2lora.layouts.families import Reach
from d2lora.settings.recipe import Machine
from d2lora.train import speed
from d2lora.train.passes import Passes, tokens_of


def rows(*counts: int) -> list[dict]:
    return [{"input_ids": [5] * count, "labels": [5] * count} for count in counts]


def test_passes_by_tokens_are_of_nearly_one_size_in_the_batch_s_order() -> None:
    passes, examples = Passes(None, 100), rows(30, 30, 30, 30, 10, 10)
    parts = passes.parts(examples)
    assert [sum(map(tokens_of, part)) for part in parts] == [90, 50]
    assert [e for part in parts for e in part] == examples
    assert [len(p) for p in passes.parts(rows(20, 20, 20))] == [3], "one pass where the whole batch fits"
    assert [len(p) for p in passes.parts(rows(10, 900, 10))] == [1, 1, 1], "a row longer than a pass has one of its own"
    assert [len(p) for p in Passes(4).parts(rows(*[900] * 10))] == [4, 4, 2]


def test_passes_are_halved_until_a_row_is_left_and_remembered(tmp_path, capsys) -> None:
    file, examples = tmp_path / "passes.json", rows(30, 30, 30, 30)
    passes = Passes.of("auto", "cpu", file)
    passes.halve(examples)
    assert passes.tokens == 60
    assert "out of memory: again with recipe.micro_batch=auto, 60 tokens a pass" in capsys.readouterr().err
    assert Passes.of("auto", "cpu", file).tokens == 60
    with pytest.raises(UserError, match=r"a single row: out of memory: try recipe.gradient_checkpointing=true"):
        passes.halve(examples[:1])
    assert Passes.of(4, "cpu", file).rows == 4


def test_memory_that_ends_before_the_first_step_makes_the_tests_smaller_and_is_not_remembered(tmp_path) -> None:
    passes = Passes.of("auto", "cpu", tmp_path / "passes.json")
    assert passes.texts_at_once(16, 400) == 16
    sizes = []
    while passes.tokens > 1:
        passes.halve()
        sizes.append(passes.texts_at_once(16, 100))
    assert sizes[:4] == [5, 2, 1, 1]
    with pytest.raises(UserError, match="out of memory"):
        passes.halve()
    assert not Passes.of("auto", "cpu", tmp_path / "passes.json").limited
    assert Passes(4).texts_at_once(16, 100) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_by_text_is_attention_with_a_mask(dtype) -> None:
    """Of pairs and plain sequences, with fewer heads of keys and values; its gradients too."""
    sizes = ((7, 4, 3), (5, 9, 1), (2, 1, 8))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [{name: [5] * size for name, size in zip(names, these, strict=True)} for these in sizes]
    layout = packing.Layout(attention=by_text.BY_TEXT, step=16)
    for examples in (pairs, rows(9, 4, 17)):
        (packed,) = packing.pack(examples, layout, 32)["passes"]
        length = packed["ids"].shape[1]
        assert length % 16 == 0
        torch.manual_seed(0)
        states = [torch.randn(1, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
        repeated = [states[0], *(s.repeat_interleave(2, 1) for s in states[1:])]
        expected = scaled_dot_product_attention(*repeated, attn_mask=packing.attention(packed, Reach())).transpose(1, 2)
        found, _ = by_text.attend(torch.nn.Module(), *states, None, stretches=packed["stretches"])
        close = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
        assert torch.allclose(found, expected, **close)
        weight = torch.randn(found.shape, dtype=dtype)
        gradients = (torch.autograd.grad((x * weight).sum(), states) for x in (found, expected))
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, **close)


def test_attention_by_text_refuses_what_it_does_not_compute() -> None:
    states = [torch.zeros(1, 1, 4, 8)] * 3
    borders = by_text.of_row([[4]], [0], 4)
    for more in ({}, {"stretches": borders, "softcap": 30.0}, {"stretches": borders, "dropout": 0.1}):
        with pytest.raises(TypeError, match="attention by text knows no"):
            by_text.attend(torch.nn.Module(), *states, None, **more)


def test_what_is_missing_for_kernels_and_compiling_is_said_in_one_line(tiny, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    with pytest.raises(UserError, match=r"recipe.kernels=true: no GPU here: recipe.kernels=false"):
        speed.faster(model, Machine(micro_batch="auto", kernels=True)).__enter__()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"recipe.compile=layers: a C\+\+ compiler is missing here"):
        speed.faster(model, Machine(micro_batch="auto", compile="layers")).__enter__()
    assert speed.layers(model) == list(model.model.layers)
