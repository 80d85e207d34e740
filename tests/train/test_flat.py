"""Weights in one tensor are trained as PyTorch trains them one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from d2lora.adapters.flat import Flat
from d2lora.train.optimizer import FlatAdamW, clip

SHAPES = [(4, 12), (4, 12), (7, 4), (3,)]


class Side:
    """Weights with an optimizer: PyTorch's, or ours in its place."""

    def __init__(self, ours: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.optimizer = AdamW(self.weights, lr=1e-2, weight_decay=0.1, fused=True)
        self.flat = Flat(self.weights) if ours else None
        if self.flat is not None:
            self.optimizer = FlatAdamW.instead_of(self.optimizer, self.flat)
            assert isinstance(self.optimizer, FlatAdamW)

    def step(self, number: int, without: int | None = None) -> None:
        """Take a step on gradients that the number decides, as a trainer does; one weight may have none."""
        generator = torch.Generator().manual_seed(number)
        for index, weight in enumerate(self.weights):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = None if index == without else gradient
        if self.flat is not None and self.flat.gather():
            self.norm = clip(self.flat, 1.0)
        else:
            self.norm = clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()


def assert_equal(ours: Side, pytorch_s: Side) -> None:
    torch.testing.assert_close(ours.norm, pytorch_s.norm)
    for one, other in zip(ours.weights, pytorch_s.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("without", [None, 1])
def test_steps_are_pytorch_s(without: int | None) -> None:
    """In the third step a weight has no gradient, as that of an expert that no token reached."""
    ours, pytorch_s = Side(True), Side(False)
    for number in range(5):
        for side in (ours, pytorch_s):
            side.step(number, without if number == 2 else None)
        assert_equal(ours, pytorch_s)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True), (True, True)])
def test_a_checkpoint_of_either_is_taken_up_by_either(first: bool, then: bool) -> None:
    whole, before, after = Side(False), Side(first), Side(then)
    for number in range(4):
        whole.step(number)
    for number in range(2):
        before.step(number)
    with torch.no_grad():
        for weight, saved in zip(after.weights, before.weights, strict=True):
            weight.copy_(saved)
    state = copy.deepcopy(before.optimizer.state_dict())
    assert state["state"].keys() == whole.optimizer.state_dict()["state"].keys()
    after.optimizer.load_state_dict(state)
    for number in range(2, 4):
        after.step(number)
    assert_equal(after, whole)


def test_weights_have_memory_of_their_own_again() -> None:
    side = Side(True)
    side.step(0)
    trained = [weight.detach().clone() for weight in side.weights]
    assert side.flat is not None
    side.flat.release()
    side.flat.weights.zero_()
    assert all(torch.equal(*pair) for pair in zip(side.weights, trained, strict=True))
    assert len({weight.untyped_storage().data_ptr() for weight in side.weights}) == len(SHAPES)


def test_any_other_optimizer_is_left_as_it_is() -> None:
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    flat = Flat(weights)
    two_groups = AdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], fused=True)
    for usual in (SGD(weights, lr=0.1), AdamW(weights), AdamW(weights[:1], fused=True), two_groups):
        assert FlatAdamW.instead_of(usual, flat) is usual
