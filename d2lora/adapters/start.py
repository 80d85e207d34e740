"""Make a trainable adapter: fresh as PEFT starts it, or the one that an earlier stage has trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from d2lora.adapters import coverage
from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, MultiLora, Plain, Residual, base_weight, config_of, start_magnitudes
from d2lora.errors import UserError
from d2lora.settings.inits import PLAIN, BaseInit, DoraInit, MultiLoraInit
from d2lora.settings.recipe import ALL_LINEAR, Lora

I = TypeVar("I", bound=BaseInit, covariant=True)  # noqa: E741


@dataclass(frozen=True)
class Start(Generic[I]):
    """Everything that a new adapter depends on: its rank, scale and layers, its initialization, and the seed."""

    lora: Lora
    init: I
    seed: int = 0


def lora_config(start: Start[BaseInit]) -> LoraConfig:
    """Return PEFT's config, with the initializations that PEFT itself does without a preparation."""
    lora = start.lora
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        **start.init.peft,
    )


def fresh(model: PreTrainedModel, start: Start[BaseInit]) -> PeftModel:
    """Return a new adapter on the model, as PEFT starts it; `prepare` then sets A and B of prepared initializations.

    UserError if PEFT, or the initialization, cannot adapt a layer.
    """
    config = lora_config(start)
    if config.target_modules == ALL_LINEAR:
        left_out = coverage.not_adapted(model)
        config.exclude_modules = sorted(left_out) or None
        coverage.tell(model, left_out)
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        _check_layers(model, start, config)
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"recipe.lora.target_modules={start.lora.target_modules}: {line}") from error
    _check_layers(wrapped, start, config)
    if not isinstance(start.lora.target_modules, str) and not config.target_parameters:  # experts PEFT names otherwise
        _check_names(wrapped, start.lora.target_modules)
    _add_multilora(wrapped, start.init)
    if isinstance(start.init, DoraInit):
        start_magnitudes(wrapped)
    return for_training(wrapped)


def _check_layers(wrapped: nn.Module, start: Start[BaseInit], config: LoraConfig) -> None:
    """Raise UserError for embeddings, and for an initialization that cannot start some layer.

    Experts that are one parameter have no weight of their own; PEFT lists them in the config before it adapts them.
    """
    modules, example = f"recipe.lora.target_modules={start.lora.target_modules}", "for example [q_proj,v_proj]"
    embeddings = _kinds(name for name, layer in layers(wrapped).items() if layer.lora_embedding_A)
    if embeddings:  # their matrices are others, for which nothing here is made
        raise UserError(f"{modules}: {', '.join(embeddings)} is an embedding: name linear layers, {example}")
    others = _kinds(name for name, layer in layers(wrapped).items() if not isinstance(layer, Linear))
    others = others or sorted(config.target_parameters or ())
    if others and not start.init.any_layer:
        raise UserError(
            f"init={start.init.name}: starts linear layers only, and all-linear takes parameters of {', '.join(others)} too: "
            f"name linear layers in recipe.lora.target_modules, {example}, or use init={PLAIN}"
        )


def _check_names(wrapped: PeftModel, targets: list[str]) -> None:
    """Raise UserError for named layers that the base does not have: PEFT is content if it finds one of them."""
    adapted = list(layers(wrapped))
    if missing := [t for t in targets if not any(name.endswith(f".{t}") for name in adapted)]:
        base = wrapped.get_base_model().named_modules()
        linear = {name.removesuffix(".base_layer").rpartition(".")[2] for name, m in base if isinstance(m, nn.Linear)}
        names = ", ".join(sorted(linear - {"lora_A", "lora_B", ADAPTER}))
        raise UserError(f"recipe.lora.target_modules={','.join(missing)}: the base has no such layer; it has {names}")


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted(set(map(coverage.kind, names)))


def _add_multilora(wrapped: PeftModel, init: BaseInit) -> bool:
    """Make the adapter a MultiLoRA if it is to be one, and tell whether it is."""
    if not isinstance(init, MultiLoraInit):
        return False
    for layer in layers(wrapped).values():
        MultiLora.start(layer, init.modules)
    return True


def taken_up(model: PreTrainedModel, init: BaseInit, record: Path) -> PeftModel:
    """Return the adapter in an earlier stage's record, to train it further: same rank, same parameters."""
    folder = record / "state" if (record / "state").is_dir() else record / "adapter"
    wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    if _add_multilora(wrapped, init):  # PEFT has read A and B; once more with the scales, which it did not know
        set_peft_model_state_dict(wrapped, load_peft_weights(str(folder)))
    if (folder / "start.safetensors").is_file():
        start = load_file(folder / "start.safetensors")
        for name, layer in layers(wrapped).items():
            device = base_weight(layer).device
            layer.lora_variant[ADAPTER] = Residual(*(start[f"{name}.{part}"].to(device) for part in "AB"))
    return for_training(wrapped)


def for_training(wrapped: PeftModel) -> PeftModel:
    """Return the adapter with our layers, and a config without an initialization.

    TRL adds a copy of the adapter for DPO's reference, and PEFT would initialize that copy again.
    """
    config = config_of(wrapped)
    config.init_lora_weights, config.eva_config = True, None
    for layer in layers(wrapped).values():
        if isinstance(layer, Linear):
            layer.lora_variant.setdefault(ADAPTER, Plain())
    return wrapped
