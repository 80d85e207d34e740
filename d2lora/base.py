"""Load the base model once a process, and check that it does not change."""

import contextlib
import functools
import gc
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from d2lora import data
from d2lora.errors import UserError
from d2lora.layouts import families
from d2lora.layouts.families import Snapshot
from d2lora.settings import Model

# The libraries' own bars and notices would hide ours.
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
logging.getLogger("accelerate").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Tested:
    """The base with an adapter merged into a copy of it (`model`), and whether the adapter changes the logits of a test input.

    `source` is the adapter's file of weights, and when it was written.
    """

    source: tuple[Path, int]
    model: torch.nn.Module
    changes: bool


@dataclass
class Base:
    """A frozen pre-trained model with its tokenizer; `checksum` and `snapshot` were taken when it was loaded.

    `source` and `revision` are what transformers' `from_pretrained` takes to load it once more. `lent` is whether an engine has the
    GPU, so that the model may be in the CPU's memory and is not to be computed with. `tested` is what was evaluated last, until
    another adapter is.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checksum: int
    snapshot: Snapshot
    source: str = ""
    revision: str | None = None
    lent: bool = False
    tested: Tested | None = None

    def check(self) -> None:
        """Raise RuntimeError if anything has changed the base's weights since they were loaded."""
        if checksum(self.model) != self.checksum:
            raise RuntimeError(f"the weights of the base {self.name} were changed by an earlier stage in this process")

    def restore(self) -> None:
        """Restore what a stage may have changed on the base: layers, patches, modes, settings. RuntimeError if weights
        changed.
        """
        remove_adapters(self.model)
        self.model.__dict__.pop("forward", None)  # TRL's trainers patch it and do not put it back
        self.model.gradient_checkpointing_disable()
        self.model.eval().requires_grad_(False)
        self.snapshot.restore(self.model)
        self.check()


LOADED: dict[str, Base] = {}  # the one base of this process, by its config as JSON


def device() -> str:
    """Return the device of all models: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the GPU's name with its memory in GiB, or "cpu"."""
    if device() == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def memory_mb() -> float:
    """Return the GPU memory in use now; without a GPU, the resident memory of the process."""
    used = torch.cuda.memory_allocated() if device() == "cuda" else psutil.Process().memory_info().rss
    return round(used / 2**20, 1)


def load_base(model: Model, cache: Path) -> Base:
    """Return the base of a config, cached in this process. `cache` is the folder for converted GGUF weights."""
    name = model.model_dump_json()
    if name not in LOADED:
        if not LOADED:
            gc.freeze()  # half a million objects of imports are never garbage: each collection would pass over them, for 0.3 s
        LOADED.clear()  # one base at a time: two of 8 B would not fit
        gc.collect()
        LOADED[name] = read_base(model, cache)
    base = LOADED[name]
    if not base.lent:
        if base.model.device.type != device():  # an engine that has ended left it there
            base.model.to(device())  # type: ignore[arg-type]  # transformers hides its argument
        base.check()
    return base


def read_base(model: Model, cache: Path) -> Base:
    """Load a base from disk or the Hub, uncached. UserError if it cannot be loaded, or is no causal language model."""
    path = data.model_files(model)
    files = source(model, cache)
    try:
        tokenizer, net = _from_pretrained(model, files)
    except OSError as error:
        if path:
            raise UserError(f"model.path={model.path}: {str(error).splitlines()[0]}") from None
        raise UserError(data.hub_problem("model.path", model.path, error)) from None
    except ValueError as error:  # transformers has no causal language model of the family, or its code is not trusted
        raise UserError(f"model.path={model.path}: {str(error).splitlines()[0][:200]}") from error
    _set_up(tokenizer, net, model.name)
    if device() == "cpu" and model.dtype != "float32":
        print(f"no GPU here: {model.name} runs in {model.dtype} on the CPU, slowly", file=sys.stderr)
    net.to(device()).eval().requires_grad_(False)  # type: ignore[arg-type]  # transformers hides its argument
    name, typed = (model.name, _typed(model, Path(files))) if path else (model.path, model.path)
    revision = None if path else getattr(net.config, "_commit_hash", None) or model.revision
    return Base(name, net, tokenizer, checksum(net), Snapshot.of(net), typed, revision)


def _typed(model: Model, path: Path) -> str:
    """Return a local base's path as people give it: absolute where it was typed so, else from the project's folder if it is there."""
    typed = Path(model.path).expanduser()
    if typed.is_absolute() and not model.gguf_package:
        return str(typed)
    root = data.ROOT.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def source(model: Model, cache: Path) -> str:
    """Return what from_pretrained reads a base from: a folder, or a name on the Hub."""
    path = data.model_files(model)
    if model.gguf_package:
        assert path is not None, "a GGUF package has files"
        path = _from_gguf(path, cache)
    return str(path or model.path)


def _from_pretrained(model: Model, source: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    remote: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(source, **remote)
    data.set_up(tokenizer, model.thinking)
    config = families.settled(AutoConfig.from_pretrained(source, **remote))
    load = functools.partial(
        AutoModelForCausalLM.from_pretrained,
        source,
        config=config,
        dtype=getattr(torch, model.dtype),
        use_safetensors=True,
        **remote,
    )
    return tokenizer, _with_attention(load)


def _set_up(tokenizer: PreTrainedTokenizerBase, net: PreTrainedModel, name: str) -> None:
    """Add what a base may lack (a padding token, end tokens), and adopt the generation settings of its checkpoint."""
    if tokenizer.pad_token is None:
        # only ever masked: labels and attention masks say what is padding
        tokenizer.pad_token = tokenizer.eos_token or data.shape(tokenizer).end
    # Greedy means greedy: some checkpoints ask for penalties and temperatures of their own.
    ends = {k: getattr(net.generation_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends["eos_token_id"] = data.ends(tokenizer, ends["eos_token_id"])
    data.say_end(tokenizer, name)
    if tokenizer.eos_token is None:  # the harness asks for one
        tokenizer.eos_token = data.shape(tokenizer).end
    net.generation_config = GenerationConfig(**ends)


def _with_attention(load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Return a model with PyTorch's attention, or with its own ("eager") if its family has no other."""
    try:
        return load(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    return load(attn_implementation="eager")


def _from_gguf(file: Path, cache: Path) -> Path:
    """Return the folder with a GGUF model as safetensors, written once: reading GGUF takes many seconds."""
    folder = cache / data.digest(file)[:20]
    if not folder.exists():
        _refuse_scaled_positions(file)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            unfinished = Path(temporary) / "model"
            net = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            net.config.__dict__.pop("quantization_config", None)
            net.hf_quantizer = None  # type: ignore[assignment]  # a plain attribute, where torch knows of modules only
            net.is_quantized = False  # type: ignore[assignment]
            net.save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
            with contextlib.suppress(OSError):  # another worker was faster
                unfinished.rename(folder)
    return folder


def _refuse_scaled_positions(file: Path) -> None:
    """Raise UserError for a GGUF file whose rotary embedding is scaled, as Llama 3.1's is.

    transformers reads the scaling of gpt-oss alone and leaves that of others out, without a word
    (`findings/gguf_rope_scaling_is_lost.sh`).
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith(("rope_freqs.", "rope_factors_"))]
    scaled += [key for key in reader.fields if key.endswith(".rope.scaling.factor") and not key.startswith("gpt-oss.")]
    if scaled:
        raise UserError(
            f"model.gguf_package: {file.name} scales its rotary embedding ({scaled[0]}), which transformers leaves out when it"
            " reads GGUF: give model.path the same model as safetensors"
        )


def checksum(model: torch.nn.Module) -> int:
    """Return a checksum of the bits of all weights that adapters do not train; a sum of integers, so exact in any
    order.
    """
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    total = 0
    for name, weight in sorted(model.state_dict().items()):
        if "lora_" not in name:
            bits = weight.view(kinds[weight.element_size()])
            total += int((bits.to(torch.int64)).sum()) + weight.numel()
    return total


def remove_adapters(model: torch.nn.Module) -> None:
    """Remove every adapter layer from a model, also those of a start that failed half-way."""
    for name, module in reversed(list(model.named_modules())):  # inner ones first
        if isinstance(module, BaseTunerLayer) and not name.endswith(".base_layer"):
            module = module.get_base_layer()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
    for left in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(left, None)
