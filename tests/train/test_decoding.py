"""Answers decoded with a cache that grows in place, from which texts leave, are those of transformers' generate."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from configurations import configurations

from d2lora.layouts import by_rows, decoding, families, llama, prepacked

ROOM = 12
PAD = 0


@pytest.fixture(scope="module")
def model(tiny: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(params=["usual", "by rows", "llama"])
def passes(model: LlamaForCausalLM, request: pytest.FixtureRequest) -> Iterator[decoding.Passes]:
    """Passes by transformers' code with PyTorch's attention, the same with attention by rows, and by our own."""
    with families.attention(model, by_rows.BY_ROWS if request.param == "by rows" else "sdpa"):
        yield llama.Decoder(model) if request.param == "llama" else decoding.Usual.of(model, model)


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of seven texts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 8, 8, 6, 5, 3, 2)
    rows = [torch.randint(3, 1000, (length,), generator=generator) for length in lengths]
    ids = torch.stack([torch.cat([torch.full((9 - len(row),), PAD), row]) for row in rows])
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in lengths])
    return ids, mask


def generated(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, ends: list[int]) -> torch.Tensor:
    settings = {"max_new_tokens": ROOM, "do_sample": False, "eos_token_id": ends, "pad_token_id": PAD}
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


def ends_at(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, steps: list[int]) -> list[int]:
    """End tokens with which some of the texts end after so many tokens."""
    free = generated(model, ids, mask, [-1])[:, ids.shape[1] :]
    return [int(free[row, step]) for row, step in enumerate(steps)]


@pytest.mark.parametrize("look", [1, 5])
@pytest.mark.parametrize("steps", [[], [0], [2, 5, 7, 0, 3], [1, 1, 1, 1, 1, 1, 1]])
def test_answers_are_those_of_generate(model, passes, texts, monkeypatch, steps: list[int], look: int) -> None:
    """The cache grows several times, and texts leave at different steps, some while others do not end at all."""
    monkeypatch.setattr(decoding, "_ROOM", 3)
    monkeypatch.setitem(decoding._PROMPTS, "cpu", 20)  # two prompts at a time
    monkeypatch.setitem(decoding._LOOK, "cpu", look)
    with families.attention(model, "sdpa"):
        ends = ends_at(model, *texts, steps)
        expected = generated(model, *texts, ends or [-1])
    answers = decoding.greedy(passes, model, *texts, ROOM, ends, PAD)
    padded = torch.nn.functional.pad(expected, (0, answers.shape[1] - expected.shape[1]), value=PAD)
    assert torch.equal(answers, padded)
    assert look > 1 or answers.shape == expected.shape


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_on_a_cpu_weights_and_attention_are_prepared_and_left_as_they_were(name: str, texts, monkeypatch) -> None:
    """All weights in oneDNN's order, by our own passes or by the family's: the answers stay, and so does the model."""
    monkeypatch.setattr(prepacked, "_LARGE", 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configurations()[name](), attn_implementation="sdpa").eval()
    assert decoding.as_llama(model) is (name == "llama")
    ends = ends_at(model, *texts, [2, 5, 7, 0, 3])
    expected = generated(model, *texts, ends)
    with decoding.prepared(model, model) as passes:
        laid_out = [layer for layer in model.modules() if "forward" in vars(layer)]
        assert bool(laid_out) is (name == "qwen3")
        assert model.config._attn_implementation == ("sdpa" if name == "llama" else by_rows.BY_ROWS)
        answers = decoding.greedy(passes, model, *texts, ROOM, ends, PAD)
    assert torch.equal(answers, expected)
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "mistral no window", "qwen2.5 default", "llama dynamic rope"])
def test_our_own_passes_give_the_familys_logits(name: str, texts) -> None:
    """Also with few heads of keys and values, biases, and other rotary embeddings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configurations()[name](), attn_implementation="sdpa").eval()
    for weight in model.parameters():  # usual initial weights are so small that attention would hardly matter
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.1)
    assert decoding.as_llama(model)
    ids, mask = texts
    one = decoding.Batch(llama.Decoder(model), model, ids, mask)
    two = decoding.Batch(decoding.Usual.of(model, model), model, ids, mask)
    with torch.inference_mode():
        for step in range(decoding._ROOM + 2):
            ours, theirs = ((batch.step() if step else batch.prompts()) for batch in (one, two))
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
            one.append(theirs.argmax(-1))
            two.append(theirs.argmax(-1))


def test_what_is_not_quite_llama_goes_through_its_own_code(model) -> None:
    assert decoding.as_llama(model)
    with_hook = copy.deepcopy(model)
    with_hook.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    others = [with_hook, adapted, adapted.get_base_model(), copy.deepcopy(model).bfloat16()]
    with prepacked.weights(patched := copy.deepcopy(model)):
        patched.model.layers[0].forward = lambda *args, **kwargs: None
    assert not any(map(decoding.as_llama, [*others, patched]))


def test_a_stop_text_ends_an_answer(model, passes, texts) -> None:
    ids, mask = texts
    whole = decoding.greedy(passes, model, ids, mask, ROOM, [-1], PAD)[:, ids.shape[1] :].tolist()
    stop = whole[0][3]
    answers = decoding.greedy(passes, model, ids, mask, ROOM, [-1], PAD, lambda answer: stop in answer)
    for answer, full in zip(answers[:, ids.shape[1] :].tolist(), whole, strict=True):
        length = full.index(stop) + 1 if stop in full else ROOM
        assert answer[:length] == full[:length]
        assert set(answer[length:]) <= {PAD}


def test_a_small_model_answers_more_at_once_on_a_cpu(model) -> None:
    assert decoding.at_once(model, 16, 100) > 100
    assert decoding.at_once(model, 16, 10**9) == 16, "no more than the memory is for"
    assert decoding.at_once(copy.deepcopy(model).bfloat16(), 16, 100) == 16, "where the batch rounds otherwise"


def test_a_text_that_has_ended_is_computed_no_more(model, passes, texts, monkeypatch) -> None:
    rows = []
    step = decoding.Batch.step
    monkeypatch.setattr(decoding.Batch, "step", lambda self: rows.append(len(self.rows)) or step(self))
    with families.attention(model, "sdpa"):
        ends = ends_at(model, *texts, [1, 2, 2, 4])
    decoding.greedy(passes, model, *texts, ROOM, ends, PAD)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 7
    assert rows[-1] <= 3


@pytest.mark.parametrize(
    ("name", "suits"),
    [
        ("llama", True),
        ("mistral no window", True),
        ("mistral sw8", False),
        ("gemma3 sw8", False),
        ("mamba", False),
        ("minimax", False),
    ],
)
def test_windows_states_and_own_inputs_are_left_to_generate(name: str, suits: bool) -> None:
    config = configurations()[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert decoding.suits(model) is suits
