"""Answers decoded with a cache that grows in place, from which texts leave, are those of transformers' generate."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from configurations import configurations

from d2lora.layouts import decoding, prepacked

ROOM = 12
PAD = 0


@pytest.fixture(scope="module")
def model(tiny: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny).eval()


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
def test_answers_are_those_of_generate(model, texts, monkeypatch, steps: list[int], look: int) -> None:
    """The cache grows several times, and texts leave at different steps, some while others do not end at all."""
    monkeypatch.setitem(decoding._ROOM, "cpu", 3)
    monkeypatch.setitem(decoding._PROMPTS, "cpu", 20)  # two prompts at a time
    monkeypatch.setitem(decoding._LOOK, "cpu", look)
    ends = ends_at(model, *texts, steps)
    expected = generated(model, *texts, ends or [-1])
    answers = decoding.greedy(model, model, *texts, ROOM, ends, PAD)
    padded = torch.nn.functional.pad(expected, (0, answers.shape[1] - expected.shape[1]), value=PAD)
    assert torch.equal(answers, padded)
    assert look > 1 or answers.shape == expected.shape


def test_on_a_cpu_weights_and_attention_are_prepared_and_left_as_they_were(model, texts, monkeypatch) -> None:
    """Attention of two texts a call, and all weights in oneDNN's order: the answers stay, and so does the model."""
    monkeypatch.setattr(decoding, "_BLOCK", 2)
    monkeypatch.setattr(prepacked, "_LARGE", 1)
    calls = []
    attention = decoding.sdpa_attention_forward
    monkeypatch.setattr(
        decoding, "sdpa_attention_forward", lambda *a, **k: calls.append(len(a[1])) or attention(*a, **k)
    )
    ends = ends_at(model, *texts, [2, 5, 7, 0, 3])
    expected = generated(model, *texts, ends)
    with decoding.prepared(model, model):
        assert any("forward" in vars(layer) for layer in model.modules())
        answers = decoding.greedy(model, model, *texts, ROOM, ends, PAD)
    assert torch.equal(answers, expected)
    assert set(calls[model.config.num_hidden_layers :]) == {1, 2}
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_a_stop_text_ends_an_answer(model, texts) -> None:
    ids, mask = texts
    whole = decoding.greedy(model, model, ids, mask, ROOM, [-1], PAD)[:, ids.shape[1] :].tolist()
    stop = whole[0][3]
    answers = decoding.greedy(model, model, ids, mask, ROOM, [-1], PAD, lambda answer: stop in answer)
    for answer, full in zip(answers[:, ids.shape[1] :].tolist(), whole, strict=True):
        length = full.index(stop) + 1 if stop in full else ROOM
        assert answer[:length] == full[:length]
        assert set(answer[length:]) <= {PAD}


def test_a_small_model_answers_more_at_once_on_a_cpu(model) -> None:
    assert decoding.at_once(model, 16, 100) > 100
    assert decoding.at_once(model, 16, 10**9) == 16, "no more than the memory is for"
    assert decoding.at_once(copy.deepcopy(model).bfloat16(), 16, 100) == 16, "where the batch rounds otherwise"


def test_a_text_that_has_ended_is_computed_no_more(model, texts, monkeypatch) -> None:
    rows = []
    step = decoding.Batch.step
    monkeypatch.setattr(decoding.Batch, "step", lambda self: rows.append(len(self.rows)) or step(self))
    decoding.greedy(model, model, *texts, ROOM, ends_at(model, *texts, [1, 2, 2, 4]), PAD)
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
