"""Run PyTorch's AdamW, and clip gradients, in one operation for all weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from d2lora.adapters.flat import Flat

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(AdamW):
    """PyTorch's fused AdamW on weights that lie in one tensor. What it saves and loads is PyTorch's, for each weight.

    A weight without a gradient, as that of an expert that no token reached, is left as it is in a step. From the first
    such step on the weights have taken different numbers of steps, and PyTorch's own code goes on.
    """

    def __init__(self, usual: AdamW, flat: Flat) -> None:
        """Take over the groups and settings of an AdamW; all of its weights are those of `flat`, in one group."""
        settings = {name: value for name, value in usual.defaults.items() if name != "decoupled_weight_decay"}
        super().__init__(usual.param_groups, **settings)
        self.flat: Flat | None = flat
        self._moments: list[torch.Tensor] = []

    @classmethod
    def instead_of(cls, usual: Optimizer, flat: Flat) -> Optimizer:
        """Return one in place of a fused AdamW on just these weights, in one group; any other optimizer as it is."""
        groups = [group["params"] for group in usual.param_groups if group["params"]]
        same = len(groups) == 1 and {id(weight) for weight in groups[0]} == {id(weight) for weight in flat.parameters}
        if type(usual) is AdamW and usual.defaults["fused"] and same and flat.intact():
            return cls(usual, flat)
        return usual

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        flat = self.flat
        if flat is None or closure is not None or not flat.gather() or not self._joined(flat):
            self._separate()
            return super().step(closure)
        (group,) = (group for group in self.param_groups if group["params"])
        beta1, beta2 = group["betas"]
        first, second = ([moment] for moment in self._moments)
        settings = {name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
        steps = [self.state[flat.parameters[0]]["step"]]
        adamw(
            [flat.weights], [flat.gradients], first, second, [], steps, fused=True, beta1=beta1, beta2=beta2, **settings
        )
        return None

    def _joined(self, flat: Flat) -> bool:
        """Have the moments of all weights in one tensor each, and one counter; False if the counters differ."""
        if self._moments:
            return True
        states = [self.state[weight] for weight in flat.parameters]
        if len({float(state["step"]) if state else 0.0 for state in states}) > 1:
            return False
        step = states[0].get("step", torch.zeros((), device=flat.weights.device)).clone()
        self._moments = [torch.zeros_like(flat.weights) for _ in _MOMENTS]
        for name, moment in zip(_MOMENTS, self._moments, strict=True):
            for state, view in zip(states, flat.views(moment), strict=True):
                if name in state:
                    view.copy_(state[name])
                state[name] = view
        for state in states:
            state["step"] = step
        return True

    def _separate(self) -> None:
        """Give each weight a counter of its own, for PyTorch's code."""
        self.flat, self._moments = None, []
        for state in filter(None, self.state.values()):
            state["step"] = state["step"].clone()

    def state_dict(self) -> dict[str, Any]:
        """Return PyTorch's state, with a counter for each weight."""
        saved = super().state_dict()
        saved["state"] = {i: state | {"step": state["step"].clone()} for i, state in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take PyTorch's state, of this optimizer or of AdamW."""
        super().load_state_dict(state_dict)
        self._moments = []


def clip(flat: Flat, most: float) -> torch.Tensor:
    """Clip gathered gradients to a norm of `most`, and return the norm before, as PyTorch's function does."""
    whole = torch.nn.Parameter(flat.weights)
    whole.grad = flat.gradients
    return clip_grad_norm_([whole], most)
