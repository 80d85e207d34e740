"""What a model family's config says of it: which layers see how far, which carry a state, what is random in training."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

# Attention that a mask describes whole. Any other layer carries a state, a convolution or an index over earlier tokens.
_MASKED = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
_RANDOM = ("dropout", "pdrop", "layerdrop", "drop_rate", "drop_path", "jitter_noise", "_noise")


@dataclass(frozen=True)
class Reach:
    """How far back a layer's tokens see: to all, the last `size` ("sliding"), or those of their own `size` ("chunked")."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0


def reaches(config: PreTrainedConfig) -> dict[str, Reach] | None:
    """The reach of each type of layer, under "" where all are of one; None where a layer carries a state."""
    text = config.get_text_config()
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    types = set(getattr(text, "layer_types", None) or ())
    if not types <= _MASKED.keys():
        return None
    one = Reach("sliding", window) if window else Reach("chunked", chunk) if chunk else Reach()
    known = {"full": Reach(), "sliding": Reach("sliding", window or 0), "chunked": Reach("chunked", chunk or 0)}
    if len(types) < 2:
        return {"": known[_MASKED[types.pop()]] if types else one}
    return {name: known[_MASKED[name]] for name in sorted(types)}


def settled(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with every dropout, noise and auxiliary loss of the base's own off.

    What they drop would depend on how a batch is laid out, and on which trainer ran before in the process; TRL would add a router's
    loss to the method's.
    """
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            settled(value)
        elif isinstance(value, float) and value and any(word in key for word in _RANDOM):
            setattr(config, key, 0.0)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    return config


@contextlib.contextmanager
def attention(model: PreTrainedModel, kind: str) -> Iterator[None]:
    """The model with another implementation of attention for a while."""
    before = model.config._attn_implementation
    if kind != before:
        model.set_attn_implementation(kind)
    try:
        yield
    finally:
        if kind != before:
            model.set_attn_implementation(before)


@dataclass(frozen=True)
class Snapshot:
    """A model's config, modules and dropouts, to be put back after a stage and compared with."""

    config: PreTrainedConfig
    modules: tuple[tuple[str, str, float | None], ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Snapshot":
        return cls(copy.deepcopy(model.config), _modules(model))

    def restore(self, model: PreTrainedModel) -> None:
        """Put back what trainers set: fields of the config, dropouts. RuntimeError if modules came or went."""
        _restore(model.config, self.config)
        dropouts = {name: p for name, _, p in self.modules if p is not None}
        for name, module in model.named_modules():
            if name in dropouts:
                module.p = dropouts[name]  # type: ignore[assignment]
        if _modules(model) != self.modules:
            changed = sorted({name for name, *_ in set(_modules(model)) ^ set(self.modules)})
            raise RuntimeError(f"a stage left the base with other modules than it had: {', '.join(changed[:3])}")


def _modules(model: PreTrainedModel) -> tuple[tuple[str, str, float | None], ...]:
    return tuple((name, type(m).__name__, _dropout(m)) for name, m in model.named_modules())


def _dropout(module: Any) -> float | None:
    p = getattr(module, "p", None)
    return float(p) if isinstance(p, float | int) and "Dropout" in type(module).__name__ else None


def _restore(live: PreTrainedConfig, saved: PreTrainedConfig) -> None:
    """Make a config's fields those of its copy, in place: the model's modules hold the config itself."""
    for key in vars(live).keys() - vars(saved).keys():
        delattr(live, key)
    for key, value in vars(saved).items():
        now = vars(live).get(key)
        if isinstance(value, PreTrainedConfig) and isinstance(now, PreTrainedConfig):
            _restore(now, value)
        elif now != value:
            vars(live)[key] = copy.deepcopy(value)
