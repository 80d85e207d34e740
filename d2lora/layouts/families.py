"""Read from a model's config how far its layers' attention reaches, and switch off what is random in training."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel

# The layer types that a mask describes completely. Other layers carry a state, a convolution or an index over earlier tokens.
_MASKED = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
_RANDOM = ("dropout", "pdrop", "layerdrop", "drop_rate", "drop_path", "jitter_noise", "_noise")


@dataclass(frozen=True)
class Reach:
    """The tokens that a token attends to: all earlier ones, the last `size` ("sliding"), or its own chunk of `size`."""

    kind: Literal["full", "sliding", "chunked"] = "full"
    size: int = 0


def reaches(config: PreTrainedConfig) -> dict[str, Reach] | None:
    """Return the reach of each type of layer, under "" if all layers have one type; None if a layer carries a state."""
    text = config.get_text_config()
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    types = set(getattr(text, "layer_types", None) or ())
    if not types <= _MASKED.keys():
        return None
    one = Reach("sliding", window) if window else Reach("chunked", chunk) if chunk else Reach()
    by_kind = {"full": Reach(), "sliding": Reach("sliding", window or 0), "chunked": Reach("chunked", chunk or 0)}
    if len(types) < 2:
        return {"": by_kind[_MASKED[types.pop()]] if types else one}
    return {name: by_kind[_MASKED[name]] for name in sorted(types)}


def whole(reaches: dict[str, Reach] | None, length: int) -> bool:
    """Tell whether each layer's tokens attend to all earlier ones of a text of this length."""
    return reaches is not None and all(reach.kind == "full" or reach.size >= length for reach in reaches.values())


def settled(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout, noise and auxiliary loss of the base's config to 0, in place, and return the config.

    Dropout of the base would depend on how a batch is laid out, and on which trainer ran before in the process; a
    router's auxiliary loss would be added to the method's by TRL.
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
    """Run the model with another implementation of attention inside the `with` block."""
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
    """A model's config, modules and dropouts, to restore after a stage and to compare with."""

    config: PreTrainedConfig
    modules: tuple[tuple[str, str, float | None], ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Snapshot":
        """Take the snapshot of a model."""
        return cls(copy.deepcopy(model.config), _modules(model))

    def restore(self, model: PreTrainedModel) -> None:
        """Restore what trainers changed: fields of the config, dropouts. RuntimeError if modules were added or removed."""
        _restore(model.config, self.config)
        dropouts = {name: p for name, _, p in self.modules if p is not None}
        for name, module in model.named_modules():
            if name in dropouts:
                module.p = dropouts[name]
        if _modules(model) != self.modules:
            changed = sorted({name for name, *_ in set(_modules(model)) ^ set(self.modules)})
            raise RuntimeError(f"a stage left the base with other modules than it had: {', '.join(changed[:3])}")


def _modules(model: PreTrainedModel) -> tuple[tuple[str, str, float | None], ...]:
    """Return the name, class and dropout of each module."""
    return tuple((name, type(m).__name__, _dropout(m)) for name, m in model.named_modules())


def _dropout(module: Any) -> float | None:
    """Return the probability of a dropout layer; None for another module."""
    p = getattr(module, "p", None)
    return float(p) if isinstance(p, float | int) and "Dropout" in type(module).__name__ else None


def _restore(live: PreTrainedConfig, saved: PreTrainedConfig) -> None:
    """Set a config's fields to those of its copy, in place: the model's modules hold the config itself."""
    for key in vars(live).keys() - vars(saved).keys():
        delattr(live, key)
    for key, value in vars(saved).items():
        current = vars(live).get(key)
        if isinstance(value, PreTrainedConfig) and isinstance(current, PreTrainedConfig):
            _restore(current, value)
        elif current != value:
            vars(live)[key] = copy.deepcopy(value)
