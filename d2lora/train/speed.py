"""Run a model's layers compiled, or with kernels from the Hub, inside a `with` block, and put them back.

Both change results by rounding only, which is checked on the model before the first step.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.utils import is_kernels_available

from d2lora.errors import UserError
from d2lora.settings.recipe import Machine


@contextlib.contextmanager
def faster(model: PreTrainedModel, machine: Machine) -> Iterator[None]:
    """Run a model as the recipe's `compile` and `kernels` say. UserError, in one line, if this machine can't."""
    with contextlib.ExitStack() as stack:
        if machine.kernels:
            stack.enter_context(_kernels(model))
        if machine.compile:
            stack.enter_context(_compiled(model))
        yield


def names(machine: Machine) -> str:
    """Return the settings that are on, as they are typed; empty if none is."""
    on = {"recipe.kernels=true": machine.kernels, "recipe.compile=layers": machine.compile}
    return " ".join(name for name, value in on.items() if value)


def layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the decoder's layers: the longest list of modules in the model that are of few classes."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


@contextlib.contextmanager
def _compiled(model: PreTrainedModel) -> Iterator[None]:
    """Compile each decoder layer: all have one code, so it is compiled once, and again for new lengths of rows only."""
    _needs_compiler()
    compiled = layers(model)
    for layer in compiled:
        layer.compile()
    try:
        yield
    finally:
        for layer in compiled:
            layer._compiled_call_impl = None
        torch.compiler.reset()


def _needs_compiler() -> None:
    """Raise UserError if torch.compile finds nothing to compile with: Triton on a GPU, a C++ compiler on a CPU."""
    from torch._inductor import cpp_builder
    from torch.utils._triton import has_triton

    try:
        missing = "Triton" if torch.cuda.is_available() and not has_triton() else ""
        if not torch.cuda.is_available():
            cpp_builder.get_cpp_compiler()
    except Exception:  # as many classes of errors as there are ways not to have a compiler
        missing = "a C++ compiler"
    if missing:
        raise UserError(f"recipe.compile=layers: {missing} is missing here: install it, or recipe.compile=false")


@contextlib.contextmanager
def _kernels(model: PreTrainedModel) -> Iterator[None]:
    """Give a model's layers the kernels that transformers names for them (norms and MLPs are Liger's).

    It is what `model_init_kwargs={"use_kernels": True}` does in TRL; transformers can't undo it, so forwards are put back
    here.
    """
    if not torch.cuda.is_available() or not is_kernels_available():
        missing = "no kernels package here (pip install kernels)" if torch.cuda.is_available() else "no GPU here"
        raise UserError(f"recipe.kernels=true: {missing}: recipe.kernels=false")
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    try:
        try:
            model.set_use_kernels(True)
        except Exception as error:  # the Hub can't be reached, or has none for this GPU
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"recipe.kernels=true: {line[:160]}: recipe.kernels=false") from error
        yield
    finally:
        model.__dict__.pop("_use_kernels", None)
        for name, module in model.named_modules():
            if before.get(name) is not None:
                module.forward = before[name]
            else:
                module.__dict__.pop("forward", None)
