"""The base, loaded once a process, and the adapters on it."""

import contextlib
import copy
import functools
import gc
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import psutil
import torch
import transformers
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora import coverage, data, families, inits, proof
from d2lora.config import Model
from d2lora.errors import UserError
from d2lora.families import Snapshot
from d2lora.plan import digest
from d2lora.store import write_json

# The libraries' own bars and notices would hide ours.
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
logging.getLogger("accelerate").setLevel(logging.ERROR)


@dataclass
class Base:
    """A frozen pre-trained model with its tokenizer; `checksum` and `snapshot` are of its weights and settings as loaded."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checksum: int
    snapshot: Snapshot

    def check(self) -> None:
        """RuntimeError if anything has changed the base's weights since they were loaded."""
        if checksum(self.model) != self.checksum:
            raise RuntimeError(f"the weights of the base {self.name} were changed by an earlier stage in this process")

    def restore(self) -> None:
        """Put back what a stage may have left on the base: layers, patches, modes, settings. RuntimeError if weights changed."""
        coverage.take_off(self.model)
        self.model.__dict__.pop("forward", None)  # TRL's trainers patch it and do not put it back
        self.model.gradient_checkpointing_disable()
        self.model.eval().requires_grad_(False)
        self.snapshot.restore(self.model)
        self.check()

    def attention(self, asked: str) -> str:
        """The implementation of attention to train with: what was asked for, but eager where a family has no other."""
        loaded = self.model.config._attn_implementation
        return loaded if asked == "sdpa" else asked


_loaded: dict[str, Base] = {}


def device() -> str:
    """Where everything runs: one GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_mb() -> float:
    """GPU memory in use now; without a GPU, the resident memory of the process."""
    used = torch.cuda.memory_allocated() if device() == "cuda" else psutil.Process().memory_info().rss
    return round(used / 2**20, 1)


def base(model: Model, cache: Path) -> Base:
    """The base of a config, from memory if this process has it. `cache` is where GGUF weights are kept as safetensors."""
    name = model.model_dump_json()
    if name not in _loaded:
        if not _loaded:
            gc.freeze()  # half a million objects of imports are never garbage: each collection would pass over them, for 0.3 s
        _loaded.clear()  # one base at a time: two of 8 B would not fit
        gc.collect()
        _loaded[name] = _load(model, cache)
    _loaded[name].check()
    return _loaded[name]


def _load(model: Model, cache: Path) -> Base:
    place = data.model_files(model)
    if model.gguf_package:
        assert place is not None, "a GGUF package has files"
        place = _from_gguf(place, cache)
    source, remote = (
        str(place or model.path),
        {"revision": model.revision, "trust_remote_code": model.trust_remote_code},
    )
    try:
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
        found = _with_attention(load)
    except OSError as error:
        if place:
            raise UserError(f"model.path={model.path}: {str(error).splitlines()[0]}") from None
        raise UserError(data.hub_problem("model.path", model.path, error)) from None
    except ValueError as error:  # transformers has no causal language model of the family, or its code is not trusted
        raise UserError(f"model.path={model.path}: {str(error).splitlines()[0][:200]}") from error
    if tokenizer.pad_token is None:
        # only ever masked: labels and attention masks say what is padding
        tokenizer.pad_token = tokenizer.eos_token or data.shape(tokenizer).end
    # Greedy means greedy: some checkpoints ask for penalties and temperatures of their own.
    asked = found.generation_config
    ends = {k: getattr(asked, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends["eos_token_id"] = data.ends(tokenizer, ends["eos_token_id"])
    data.say_end(tokenizer, model.name)
    found.generation_config = GenerationConfig(**ends)
    if device() == "cpu" and model.dtype != "float32":
        print(f"no GPU here: {model.name} runs in {model.dtype} on the CPU, slowly", file=sys.stderr)
    found.to(device()).eval().requires_grad_(False)
    return Base(model.name if place else model.path, found, tokenizer, checksum(found), Snapshot.of(found))


def _with_attention(load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A model with PyTorch's attention, or with its own ("eager") where its family has no other."""
    try:
        return load(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
    return load(attn_implementation="eager")


def _from_gguf(file: Path, cache: Path) -> Path:
    """The folder with a GGUF model as safetensors, made once: reading GGUF takes many seconds."""
    folder = cache / data.digest(file)[:20]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            making = Path(temporary) / "model"
            found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            found.config.__dict__.pop("quantization_config", None)
            found.hf_quantizer = None
            found.is_quantized = False
            found.save_pretrained(making)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(making)
            with contextlib.suppress(OSError):  # another worker was faster
                making.rename(folder)
    return folder


def checksum(model: torch.nn.Module) -> int:
    """A checksum of all weights' bits that adapters do not change; a sum of integers, so exact in any order."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    total = 0
    for name, weight in sorted(model.state_dict().items()):
        if "lora_" not in name:
            bits = weight.view(kinds[weight.element_size()])
            total += int((bits.to(torch.int64)).sum()) + weight.numel()
    return total


@contextlib.contextmanager
def adapter(base: Base, spec: dict, record: Path | None) -> Iterator[PeftModel]:
    """A trainable adapter on the base: the one in the folder of a record, or a fresh one of `spec` (lora, init, seed).

    On leaving, the base is as it was, and checked to be, also where the start fails.
    """
    torch.manual_seed(spec.get("seed", 0))
    try:
        wrapped = inits.taken_up(base.model, spec, record) if record else inits.fresh(base.model, spec)
        # With a name, PEFT asks the Hub at every checkpoint.
        wrapped.peft_config["default"].base_model_name_or_path = ""
        with inits.quantized(wrapped) if record and spec["init"]["name"] == "loftq" else contextlib.nullcontext():
            yield wrapped
    finally:
        base.restore()


@contextlib.contextmanager
def in_training(wrapped: PeftModel) -> Iterator[None]:
    """Have `wrapped.train()` reach the adapter alone: the base stays as in evaluation, so it draws no random numbers.

    Routers sample and states are kept otherwise in some families' training. With gradient checkpointing the layers that do it
    must believe that they train.
    """
    parts = [m for name, m in wrapped.named_modules() if "lora_" in name or isinstance(m, BaseTunerLayer)]
    own = {id(m) for m in parts} | {id(wrapped)}
    recomputing = [m for m in wrapped.modules() if isinstance(m, GradientCheckpointingLayer)]

    def train(mode: bool = True) -> PeftModel:
        if wrapped.training is not mode:
            for module in [wrapped, *parts]:
                module.training = mode
        for module in recomputing:  # each time: Trainer turns it on after its first call
            module.training = mode and module.gradient_checkpointing
        return wrapped

    wrapped.eval()
    assert all(not m.training for m in wrapped.modules() if id(m) not in own), "the base is in evaluation"
    wrapped.train = train
    try:
        yield
    finally:
        del wrapped.train


@contextlib.contextmanager
def trained(base: Base, folder: Path | None, init: str = "lora") -> Iterator[tuple[torch.nn.Module, bool]]:
    """The base with the adapter in `folder` for inference, and whether it changes the logits of a probe (`check_applied`).

    The base alone if there is no folder. LoftQ's adapter is for a quantized base.
    """
    if folder is None:
        yield base.model, False
        return
    try:
        wrapped = PeftModel.from_pretrained(base.model, folder).eval()
        with inits.quantized(wrapped) if init == "loftq" else contextlib.nullcontext():
            changes = check_applied(base, wrapped)
            yield _merged(base, wrapped) or wrapped, changes
    finally:
        base.restore()


def _merged(base: Base, wrapped: PeftModel) -> torch.nn.Module | None:
    """A merged copy, a third faster; None where it is not the same model to rounding.

    bfloat16 would round small updates away, and layers that share one weight would get all their adapters.
    """
    if base.model.dtype != torch.float32:
        return None
    ids = _probe(base)
    with torch.inference_mode():
        expected = wrapped(input_ids=ids).logits
    merged = copy.deepcopy(wrapped).merge_and_unload(safe_merge=True)
    with torch.inference_mode():
        off = proof.off(merged(input_ids=ids).logits, expected)
    return merged if off <= proof.EXACT else None


def _probe(base: Base) -> torch.Tensor:
    """Ids of a text, at least some dozens of tokens whatever the tokenizer makes of it."""
    ids = base.tokenizer("The adapter must change these logits, and merged or read again it must not.")["input_ids"]
    return torch.tensor([(ids * 40)[:40]], device=base.model.device)


def check_applied(base: Base, wrapped: PeftModel) -> bool:
    """Whether the adapter changes the logits of a probe. RuntimeError if one with non-zero weights doesn't even when enlarged.

    After few steps of a small learning rate it may not: what it adds to a bfloat16 activation is less than half of its last bit.
    """
    if not any(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name):
        return False
    ids = _probe(base)
    with torch.inference_mode():
        with wrapped.disable_adapter():
            without = wrapped(input_ids=ids).logits
        for factor in (1, 10**3, 10**6, 10**9):
            with rescale_adapter_scale(wrapped, factor):
                if not torch.equal(wrapped(input_ids=ids).logits, without):
                    return factor == 1
    raise RuntimeError("the adapter has non-zero weights and is not applied")


def covered(model: Model, target_modules: str | list[str]) -> dict:
    """What an adapter reaches of a model (coverage.of), from its config alone: no weights are read."""
    place = data.model_files(model)
    remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if model.gguf_package:
        assert place is not None, "a GGUF package has files"
        config = AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
    else:
        config = AutoConfig.from_pretrained(str(place or model.path), **remote)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(families.settled(config), trust_remote_code=model.trust_remote_code)
        lora = {"r": 1, "alpha": 1, "dropout": 0.0, "target_modules": target_modules}
        return coverage.of(inits.fresh(empty, {"lora": lora, "init": {"name": "lora"}}))


def remember_coverage(model: dict, target_modules: str | list[str], file: str) -> None:
    """Write the coverage of a model (its config as a mapping) into a JSON file."""
    write_json(Path(file), covered(Model.model_validate(model), target_modules))


@dataclass(frozen=True)
class Saved:
    """What an adapter was when it was saved: the weights of each layer (A, B of a plain adapter) and the logits of a probe."""

    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor
    noise: float  # of the logits, with the probe in a padded batch


def save(base: Base, wrapped: PeftModel, record: Path) -> Saved:
    """The adapter in PEFT's format: `PeftModel.from_pretrained(base, record / "adapter")` loads it, as `check_saved` tries."""
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    inits.save(wrapped, record)
    ids = _probe(base)
    padded = torch.cat([ids, ids[:, :8]], 1)
    with torch.inference_mode():
        wrapped.eval()
        logits = wrapped(input_ids=ids).logits
        again = wrapped(input_ids=padded).logits[:, : ids.shape[1]]
    return Saved(
        inits.plain_weights(wrapped), logits, proof.off(again, logits) if base.model.dtype != torch.float32 else 0.0
    )


def check_round_trip(base: Base, spec: dict, proofs: Path) -> None:
    """UserError where an adapter on these layers is not read from disk as it was saved: before it is trained, once a model."""
    lora = {key: spec[key] for key in ("lora", "seed") if key in spec} | {"init": {"name": "lora"}}
    name, memory = f"adapter read again, {digest(lora['lora'], 8)}", proof.Memory(proofs, spec["model"])
    if memory.get(name, 1, 0):
        return
    with tempfile.TemporaryDirectory() as folder:
        with adapter(base, lora, None) as wrapped:
            saved = save(base, wrapped, Path(folder))
        try:
            check_saved(base, saved, Path(folder), "lora")
        except RuntimeError as error:
            raise UserError(
                f"recipe.lora.target_modules={lora['lora']['target_modules']}: {error}: name layers that PEFT reads again, for example [q_proj,v_proj]"
            ) from error
    memory.put(name, 1, proof.Proof(name, 0, 0.0, proof.EXACT, True))


def check_saved(base: Base, saved: Saved, record: Path, init: str) -> None:
    """RuntimeError unless the adapter read from the record is the one that was trained: its weights and the probe's logits."""
    try:
        wrapped = PeftModel.from_pretrained(base.model, record / "adapter").eval()
        found = inits.plain_weights(wrapped)
        lost = [k for k, pair in saved.weights.items() if k not in found or not all(map(torch.equal, found[k], pair))]
        if lost or found.keys() != saved.weights.keys():
            raise RuntimeError(
                f"the saved adapter is not the trained one: {len(lost)} of {len(saved.weights)} layers differ, for example "
                f"{lost[0].removeprefix('base_model.model.') if lost else '?'}"
            )
        with inits.quantized(wrapped) if init == "loftq" else contextlib.nullcontext(), torch.inference_mode():
            off = proof.off(wrapped(input_ids=_probe(base)).logits, saved.logits)
        if not off <= max(proof.EXACT, 4 * saved.noise, 0.05 if base.model.dtype != torch.float32 else 0):
            raise RuntimeError(
                f"the saved adapter is not the trained one: a log-probability of a probe is off by {off:.2g}"
            )
    finally:
        base.restore()
