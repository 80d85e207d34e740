"""How an adapter starts: the initializations of docs/inits.md, on PEFT's layers.

The base's weights W never change. An initialization that puts part of W into the adapter (PiSSA, OLoRA, MiLoRA, CorDA, LoRA-GA)
trains A and B on the residual W - s B0 A0, which is W with an adapter of [B - B0, B0] and [A; A - A0]: see `Residual`.
"""

import contextlib
import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import transpose
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import linear, normalize
from transformers import PreTrainedModel

from d2lora.adapters import coverage
from d2lora.adapters.coverage import layers
from d2lora.errors import UserError
from d2lora.progress import Progress

ADAPTER = "default"
_EVA_BATCH = 8
_EVA_PASSES = 50
_LEFT_BY_PEFT = (
    *("eigens", "sample_count", "covariance_matrix", "corda_method", "rank"),
    *("_peft_loraga_grad", "_peft_loraga_grad_count"),
)


def lora_config(spec: dict) -> LoraConfig:
    """PEFT's config of a stage's spec (lora, init): of what PEFT itself can start without a preparation."""
    lora, name = spec["lora"], spec["init"]["name"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        init_lora_weights=name if name in ("gaussian", "orthogonal") else True,
    )


def fresh(model: PreTrainedModel, spec: dict) -> PeftModel:
    """A new adapter on the model, as PEFT starts it; A and B of prepared initializations come with `prepare`."""
    config = lora_config(spec)
    if config.target_modules == "all-linear":
        left_out = coverage.not_adapted(model)
        config.exclude_modules = sorted(left_out) or None
        coverage.tell(model, left_out)
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        _check_layers(model, spec)
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"recipe.lora.target_modules={spec['lora']['target_modules']}: {line}") from error
    _check_layers(wrapped, spec)
    _add_multilora(wrapped, spec)
    return _for_training(wrapped)


_ANY_LAYER = ("lora", "gaussian")  # these start what PEFT adapts as parameters (experts) as they start a linear layer


def _check_layers(wrapped: nn.Module, spec: dict) -> None:
    """UserError for an initialization that cannot start some layer: experts that are one parameter have no weight of their own."""
    name = spec["init"]["name"]
    others = [place for place, layer in layers(wrapped).items() if not isinstance(layer, Linear)]
    if name not in _ANY_LAYER and others:
        kinds = sorted(set(map(coverage.kind, others)))
        raise UserError(
            f"init={name}: starts linear layers only, and all-linear takes parameters of {', '.join(kinds)} too: name linear layers in "
            "recipe.lora.target_modules, for example [q_proj,v_proj], or use init=lora"
        )


def taken_up(model: nn.Module, spec: dict, record: Path) -> PeftModel:
    """The adapter that a stage left in its record's folder, to be trained on: same rank, same parameters."""
    folder = record / "state" if (record / "state").is_dir() else record / "adapter"
    wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
    if _add_multilora(wrapped, spec):  # PEFT has read A and B; once more with the scales, which it did not know
        set_peft_model_state_dict(wrapped, load_peft_weights(str(folder)))
    if (folder / "start.safetensors").is_file():
        start = load_file(folder / "start.safetensors")
        for name, layer in layers(wrapped).items():
            device = layer.lora_A[ADAPTER].weight.device
            layer.lora_variant[ADAPTER] = Residual(*(start[f"{name}.{part}"].to(device) for part in "AB"))
    return _for_training(wrapped)


def _for_training(wrapped: PeftModel) -> PeftModel:
    """The adapter with layers of ours, and a config that starts nothing: TRL adds a copy for DPO's reference, and PEFT would start
    that anew."""
    config = wrapped.peft_config[ADAPTER]
    config.init_lora_weights, config.eva_config = True, None
    for layer in layers(wrapped).values():
        if isinstance(layer, Linear):
            layer.lora_variant.setdefault(ADAPTER, Plain())
    return wrapped


def save(wrapped: PeftModel, record: Path) -> None:
    """The adapter as record/adapter, in PEFT's format for the original base, and where that is another one, as it is
    trained (rank r) in record/state."""
    config = wrapped.peft_config[ADAPTER]
    if isinstance(config.target_modules, set):  # a set's order, and with it the file, would be another in each process
        config.target_modules = sorted(config.target_modules)
    variants = {name: layer.lora_variant.get(ADAPTER) for name, layer in layers(wrapped).items()}
    folded = any(isinstance(variant, Residual | MultiLora) for variant in variants.values())
    _save_peft(wrapped, record / ("state" if folded else "adapter"))
    start = {f"{n}.{part}": getattr(v, part) for n, v in variants.items() if isinstance(v, Residual) for part in "AB"}
    if start:
        save_file({name: tensor.contiguous() for name, tensor in start.items()}, record / "state" / "start.safetensors")
    if folded:
        _save_folded(wrapped, record / "adapter")


def plain_weights(wrapped: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (r, in) and B (out, r) of each layer's plain adapter, copied, by the layer's name."""
    found = {}
    for name, layer in layers(wrapped).items():
        variant = layer.lora_variant.get(ADAPTER)
        A, B = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
        if isinstance(variant, Residual | MultiLora):
            A, B = variant.folded(layer, ADAPTER)
        found[name] = (A.detach().float().cpu().clone(), B.detach().float().cpu().clone())
    return found


def _save_peft(wrapped: PeftModel, folder: Path) -> None:
    wrapped.save_pretrained(folder, selected_adapters=[ADAPTER], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _save_folded(wrapped: PeftModel, folder: Path) -> None:
    """A plain adapter with the same output, in PEFT's format."""
    folder.mkdir()
    tensors, rank = {}, 0
    for name, layer in layers(wrapped).items():
        variant = layer.lora_variant[ADAPTER]
        assert isinstance(variant, Residual | MultiLora), "ours"
        down, up = variant.folded(layer, ADAPTER)
        tensors |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
        rank = len(down)
    save_file({k: t.detach().cpu() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.deepcopy(wrapped.peft_config[ADAPTER])
    config.lora_alpha, config.r = config.lora_alpha * rank // config.r, rank  # alpha / r stays
    config.inference_mode = True
    config.save_pretrained(str(folder))


# --- layers --------------------------------------------------------------------------------------------------------


def _scaled(added: torch.Tensor, layer: LoraLayer, adapter: str) -> torch.Tensor:
    """s times what an adapter adds. A product with 1 (alpha = r, the default) would be two passes over as much as the output."""
    scale = layer.scaling[adapter]
    return added if scale == 1 else added * scale


class Plain(LoraVariant):
    """LoRA as PEFT has it, W x + s B A x, scaled as above."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs) -> None:
        """Nothing beyond PEFT's own: asked for where an initialization changes the rank."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        A, B, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        return result + _scaled(B(A(dropout(x))), module, active_adapter)


class Residual(LoraVariant):
    """LoRA on the residual weights W - s B0 A0, with W left as it is.

    Its output is W x + s (B A - B0 A0) x, computed as s ((B - B0) A + B0 (A - A0)) x: exactly 0 at the start, and what
    training changes is not the difference of two large numbers, which bfloat16 would lose. The gradients of A and B are
    those of s B A x.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        self.A, self.B = A, B  # A0 (r, in), B0 (out, r)

    def folded(self, module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(2r, in) and (out, 2r) of the plain adapter with the same output."""
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        return torch.cat([A, A - self.A]), torch.cat([B - self.B, self.B], 1)

    def forward(self, module, active_adapter, x, result, **kwargs):
        down, up = self.folded(module, active_adapter)
        return result + _scaled(linear(linear(x, down), up), module, active_adapter)


class MultiLora(LoraVariant):
    """MultiLoRA (Wang et al. 2023, arXiv 2311.11501, section 4): parallel modules, A and B Kaiming-uniform, scales from zero.

    W x + s sum_i diag(c_i) B_i A_i x for i = 1 .. modules, each of rank r / modules so that the number of parameters is that of
    LoRA of rank r, but for the learned scales c_i (out). The modules are blocks of PEFT's A (r, in) and B (out, r).
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, modules: int) -> None:  # type: ignore[override]
        B = module.lora_B[adapter_name].weight
        with torch.no_grad():
            for block in B.chunk(modules, 1):
                nn.init.kaiming_uniform_(block, a=math.sqrt(5))  # as PEFT has started A
        if not hasattr(module, "lora_scale"):
            module.lora_scale = nn.ParameterDict()
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_scale")
        module.lora_scale[adapter_name] = nn.Parameter(torch.zeros(modules, len(B), device=B.device, dtype=B.dtype))
        module.lora_variant[adapter_name] = MultiLora()

    @staticmethod
    def folded(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(r, in) and (out, r) of the plain adapter with the same output."""
        B, scale = module.lora_B[adapter].weight, module.lora_scale[adapter]
        return module.lora_A[adapter].weight, B * scale.T.repeat_interleave(B.shape[1] // len(scale), 1)

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        down, up = MultiLora.folded(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        return result + _scaled(linear(linear(x, down), up), module, active_adapter)


def _add_multilora(wrapped: PeftModel, spec: dict) -> bool:
    """Makes the adapter a MultiLoRA if the spec says so."""
    if spec["init"]["name"] != "multilora":
        return False
    for layer in layers(wrapped).values():
        MultiLora.init(layer, ADAPTER, spec["init"]["modules"])
    return True


# --- preparations --------------------------------------------------------------------------------------------------


def milora_init(layer: LoraLayer, adapter_name: str) -> None:
    """MiLoRA (Wang et al. 2024, arXiv 2406.09044, section 3): A and B from the r smallest singular values of W.

    Written like PEFT's own methods of LoraLayer: it takes s B A out of the base layer's weight.
    """
    weight = layer.get_base_layer().weight
    r, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
    W = transpose(weight.data.float(), layer.fan_in_fan_out)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[-r:] / scaling).sqrt()
    layer.lora_A[adapter_name].weight.data = root[:, None] * Vh[-r:]
    layer.lora_B[adapter_name].weight.data = U[:, -r:] * root
    minor = scaling * layer.lora_B[adapter_name].weight.data @ layer.lora_A[adapter_name].weight.data
    weight.data = transpose((W - minor).to(weight.dtype), layer.fan_in_fan_out)


def _lora_ga_init(layer: LoraLayer, config: LoraGAConfig) -> None:
    """LoRA-GA (Wang et al. 2024, arXiv 2407.05000) from the gradient that PEFT has left on the base layer.

    PEFT weighs B by the gradient's singular values and leaves A unscaled, so where B starts depends on the loss's scale. The
    paper (theorem 3.2) and its authors' code take orthonormal directions, both times out^(1/4) / gamma^(1/2): so does this.
    """
    layer.lora_ga_init(ADAPTER, config)
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    factor = len(B) ** 0.25 / config.stable_gamma**0.5
    A.data, B.data = normalize(A.data.float(), dim=1) * factor, normalize(B.data.float(), dim=0) * factor


def _olora_init(layer: LoraLayer) -> None:
    """OLoRA (Büyükakyüz 2024, arXiv 2406.01775) as PEFT has it; its own takes Conv1D's weight (in, out) for one of (out, in)."""
    weight = layer.get_base_layer().weight
    weight.data = transpose(weight.data, layer.fan_in_fan_out)
    layer.olora_init(ADAPTER)


# What each initialization from the base's weights does to one layer; those of PEFT take s B A out of the base's weight.
_FROM_WEIGHTS: dict[str, Callable[[LoraLayer], None]] = {
    "pissa": lambda layer: layer.pissa_init(ADAPTER, "pissa"),
    "pissa_niter_16": lambda layer: layer.pissa_init(ADAPTER, "pissa_niter_16"),
    "olora": lambda layer: _olora_init(layer),
    "milora": lambda layer: milora_init(layer, ADAPTER),
}


def prepare(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    """Start a fresh adapter as spec["init"] says, on `rows` ({input_ids, labels}) where it looks at data.

    UserError where rank or rows do not allow it. RuntimeError where PEFT has left a layer as plain LoRA would start.
    """
    _check_rank(wrapped, spec)
    _PREPARE[spec["init"]["name"]](wrapped, spec, rows, progress)


def _check_rank(wrapped: PeftModel, spec: dict) -> None:
    """UserError unless every layer has as many directions as the initialization takes."""
    name, r = spec["init"]["name"], spec["lora"]["r"]
    wanted = math.ceil(r * {"lora_ga": 2, "eva": spec["init"].get("rho", 1)}.get(name, 1))
    for place, layer in layers(wrapped).items():
        there = layer.in_features if name == "eva" else min(layer.in_features, layer.out_features)
        if wanted > there:
            raise UserError(
                f"recipe.lora.r={r}: init={name} takes {wanted} directions and {place.removeprefix('base_model.model.')} has {there}"
            )


def _from_weights(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    _take_out(wrapped, _FROM_WEIGHTS[spec["init"]["name"]], progress)


@torch.no_grad()
def _take_out(wrapped: PeftModel, init: Callable[[LoraLayer], None], progress: Progress) -> None:
    """Start A and B of each layer by a method that changes the layer's weight, and leave the weight as it was."""
    found = layers(wrapped)
    for index, (name, layer) in enumerate(found.items()):
        weight = layer.get_base_layer().weight
        kept, weight.data = weight.data, weight.data.clone()
        try:
            init(layer)
        finally:
            weight.data = kept
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        A.data, B.data = A.data.float().contiguous(), B.data.float().contiguous()
        if not (A.isfinite().all() and B.isfinite().all() and A.any() and B.any()):
            raise RuntimeError(f"the initialization left A or B of {name} zero or not finite")
        layer.lora_variant[ADAPTER] = Residual(A.detach().clone(), B.detach().clone())
        progress(index + 1, len(found))


def _corda(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    """CorDA (Yang et al. 2024, arXiv 2406.05223): directions of W C, C the covariance of a layer's inputs on the rows."""
    method = spec["init"]["name"].removeprefix("corda_")
    config = _of_base_layers(wrapped, spec, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))

    def run() -> None:
        for index, row in enumerate(rows):
            wrapped(input_ids=_ids(wrapped, row["input_ids"]))
            progress(index + 1, len(rows))

    with _clean(wrapped), wrapped.disable_adapter():
        preprocess_corda(wrapped, config, run)
        _take_out(wrapped, lambda layer: layer.corda_init(ADAPTER, "corda"), lambda done, total: None)


def _lora_ga(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    """LoRA-GA: the gradient of the loss on the rows, averaged, at the base."""
    init = spec["init"]
    ga = LoraGAConfig(direction=init["direction"], scale="stable", stable_gamma=init["gamma"])
    config = _of_base_layers(wrapped, spec, init_lora_weights="lora_ga", lora_ga_config=ga)

    def step() -> None:
        for index, row in enumerate(rows):
            loss = wrapped(input_ids=_ids(wrapped, row["input_ids"]), labels=_ids(wrapped, row["labels"])).loss
            loss.backward()
            progress(index + 1, len(rows))

    with _clean(wrapped):
        with wrapped.disable_adapter(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook")  # the first layer's inputs need no gradient
            preprocess_loraga(wrapped, config, step)
        for name, layer in layers(wrapped).items():
            if not hasattr(layer.get_base_layer(), "_peft_loraga_grad"):  # PEFT would start it as plain LoRA
                raise RuntimeError(f"LoRA-GA has no gradient of {name}")
        _take_out(wrapped, lambda layer: _lora_ga_init(layer, ga), lambda done, total: None)


def _of_base_layers(wrapped: PeftModel, spec: dict, **settings) -> LoraConfig:
    """A config whose targets are the base layers by name: PEFT's preparations do not know what "all-linear" is."""
    names = [f"{name}.base_layer" for name in layers(wrapped)]
    return LoraConfig(r=spec["lora"]["r"], lora_alpha=spec["lora"]["alpha"], target_modules=names, **settings)


@contextlib.contextmanager
def _clean(wrapped: PeftModel):
    """Takes what PEFT's preparations leave on the base's layers away again, also when they fail.

    The base is kept for the process's next stages, which a hook that is left would end.
    """
    modules = [layer.get_base_layer() for layer in layers(wrapped).values()]
    hooks = [(kept, set(kept)) for module in modules for kept in (module._forward_hooks, module._backward_hooks)]
    try:
        yield
    finally:
        for kept, before in hooks:
            for left in kept.keys() - before:
                del kept[left]
        for module in modules:
            module.weight.grad = None
            for left in _LEFT_BY_PEFT:
                module.__dict__.pop(left, None)


def _ids(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=next(model.parameters()).device)


@torch.no_grad()
def _loftq(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    """LoftQ (Li et al. 2023, arXiv 2310.08659) with one iteration: s B A is the part of rank r of W - Q, Q being W in NF4.

    One iteration, so that Q is what a 4-bit load of the base gives. PEFT's own wants a GPU and leaves out the scale s.
    """
    found = layers(wrapped)
    for index, layer in enumerate(found.values()):
        W, r = transpose(layer.get_base_layer().weight.data, layer.fan_in_fan_out), layer.r[ADAPTER]
        U, S, Vh = torch.linalg.svd(W.float() - nf4(W).float(), full_matrices=False)
        root = (S[:r] / layer.scaling[ADAPTER]).sqrt()
        layer.lora_A[ADAPTER].weight.data = root[:, None] * Vh[:r]
        layer.lora_B[ADAPTER].weight.data = U[:, :r] * root
        progress(index + 1, len(found))


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight after 4-bit quantization: NF4 in blocks of 64, as bitsandbytes loads models."""
    import bitsandbytes.functional as bnb  # late: an extra, and only LoftQ's

    row = weight.reshape(1, -1)  # bitsandbytes mixes up the blocks on a CPU where several rows share one
    codes, state = bnb.quantize_4bit(row, blocksize=64, compress_statistics=False, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).to(weight.dtype).view_as(weight)


@contextlib.contextmanager
def quantized(wrapped: nn.Module):
    """The base's weights under the adapter in NF4 for a while; put back as they were, bit for bit."""
    found = layers(wrapped).values()
    kept = [layer.get_base_layer().weight.data for layer in found]
    try:
        for layer, original in zip(found, kept, strict=True):
            W = transpose(original, layer.fan_in_fan_out)  # as a 4-bit load turns Conv1D's weights
            layer.get_base_layer().weight.data = transpose(nf4(W), layer.fan_in_fan_out)
        yield
    finally:
        for layer, original in zip(found, kept, strict=True):
            layer.get_base_layer().weight.data = original


def _eva(wrapped: PeftModel, spec: dict, rows: list[dict], progress: Progress) -> None:
    """EVA (Paischer et al. 2024, arXiv 2410.07170): A from the inputs' principal components, ranks by explained variance."""
    rho, r = spec["init"]["rho"], spec["lora"]["r"]
    fewest, there = round(r * rho), _answer_tokens(rows)
    if there < fewest:  # PEFT would skip them, and go round for ever
        raise UserError(
            f"init=eva: {len(rows)} rows have {there} answer tokens, fewer than r * rho = {fewest}: take more of them "
            "(n, init.samples), a smaller recipe.lora.r or a smaller init.rho"
        )
    batches = [_padded(wrapped, batch) for batch in _eva_batches(rows, fewest)]
    config = wrapped.peft_config[ADAPTER]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho)
    forward = functools.partial(_counted, itertools.count(1), _EVA_PASSES * len(batches), progress)
    found = get_eva_state_dict(wrapped, batches, forward_fn=forward, show_progress_bar=False)
    if missing := layers(wrapped).keys() - found.keys():  # PEFT would start them as plain LoRA, with a warning
        raise RuntimeError(f"EVA has no directions for {', '.join(sorted(missing))}")
    initialize_lora_eva_weights(wrapped, eva_state_dict=dict(found))
    for name, layer in layers(wrapped).items():  # float32 also where PEFT has changed the rank on a bfloat16 base
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        A.data, B.data = found[name].float().contiguous(), torch.zeros_like(B.data, dtype=torch.float32)
    _for_training(wrapped)


def _answer_tokens(rows: list[dict]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])


def _eva_batches(rows: list[dict], fewest: int) -> list[list[dict]]:
    """Batches of 8 rows, and more where these have too few answer tokens: PEFT would skip them."""
    batches: list[list[dict]] = [[]]
    for row in rows:
        if len(batches[-1]) >= _EVA_BATCH and _answer_tokens(batches[-1]) >= fewest:
            batches.append([])
        batches[-1].append(row)
    if len(batches) > 1 and _answer_tokens(batches[-1]) < fewest:
        rest = batches.pop()
        batches[-1] += rest
    return batches


def _counted(count, most: int, progress: Progress, model: nn.Module, inputs: dict) -> None:
    """A forward of EVA's. RuntimeError when it has gone round the data too often without an end."""
    if (now := next(count)) > most:
        raise RuntimeError(f"EVA has not converged in {_EVA_PASSES} passes over its rows: take more of them")
    progress(now, most)
    model(**inputs)


def _padded(model: nn.Module, rows: list[dict]) -> dict[str, torch.Tensor]:
    """{input_ids, attention_mask, labels} (rows, longest)."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * (longest - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])),
            "labels": row["labels"] + [-100] * (longest - len(row["labels"])),
        }
        for row in rows
    ]
    device = next(model.parameters()).device
    return {key: torch.tensor([row[key] for row in padded], device=device) for key in padded[0]}


_PREPARE = dict.fromkeys(_FROM_WEIGHTS, _from_weights) | {
    "corda_kpm": _corda,
    "corda_ipm": _corda,
    "eva": _eva,
    "lora_ga": _lora_ga,
    "loftq": _loftq,
}
