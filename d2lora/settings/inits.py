"""The initializations (docs/inits.md)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from d2lora.settings.values import Positive, Strict

# What each initialization is told beside its name.
_INIT_SETTINGS: dict[str, set[str]] = {
    "corda_kpm": {"data", "samples"},
    "corda_ipm": {"data", "samples"},
    "eva": {"data", "samples", "rho"},
    "lora_ga": {"data", "samples", "direction", "gamma"},
    "multilora": {"modules"},
}

# Those whose base is a quantized one, with or without training: they have a base of their own to compare with.
QUANTIZING = {"loftq"}


class Init(Strict):
    """How A and B begin (docs/inits.md). `data` is what a preparation looks at: the warm-up's rows, or the cell's own n."""

    name: Literal[
        "lora", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "milora", "corda_kpm", "corda_ipm",
        "eva", "lora_ga", "loftq", "multilora",
    ]  # fmt: skip
    data: Literal["general", "task"] | None = None
    samples: Positive | None = None  # rows of it at most
    rho: Annotated[float, Field(ge=1)] | None = None  # EVA: a layer's rank is at most rho * r
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] | None = None  # LoRA-GA: which singular vectors A and B take
    gamma: Positive | None = None  # LoRA-GA: the larger, the smaller A and B
    modules: Positive | None = None  # MultiLoRA: parallel modules, of rank r / modules each

    @model_validator(mode="after")
    def _settings_of_the_init(self) -> "Init":
        wanted = _INIT_SETTINGS.get(self.name, set())
        given = {key for key in set().union(*_INIT_SETTINGS.values()) if getattr(self, key) is not None}
        if wanted != given:
            raise ValueError(
                f"{self.name} takes {', '.join(sorted(wanted)) or 'no settings'}, not {', '.join(sorted(given)) or 'none'}"
            )
        return self

    @property
    def prepared(self) -> bool:
        """Whether A and B are computed, from the base's weights or from data, by a stage of its own."""
        return self.name not in ("lora", "gaussian", "orthogonal", "multilora")

    @property
    def quantizes(self) -> bool:
        return self.name in QUANTIZING

    @property
    def random(self) -> bool:
        """Whether the preparation draws random numbers."""
        return self.name in ("pissa_niter_16", "lora_ga")
