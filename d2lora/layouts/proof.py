"""Prove layouts on the model before they are used: each token must get the log-probability that it gets in a plain
pass.

A plain pass is one text in one forward pass: no padding, no mask, no packing, the model's own head.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from d2lora.data import Example, longest
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.layouts import decoding, families, packing
from d2lora.layouts.by_text import BY_TEXT
from d2lora.layouts.packing import FLEX, Layout
from d2lora.outputs import write_json

EXACT = 1e-3  # nats a token, in float32
_NOISE = 3.0  # in bfloat16: times the rounding noise that was measured ...
_LEAST = 0.02  # ... and at least this, because some batches show no noise
_COARSE = 1.0  # in bfloat16, where the two passes differ in length or batch size
_SHOWN = 5  # examples at most: the longest, and the shortest
_PACKAGES = ("torch", "transformers", "peft", "trl")
Tokens = dict[tuple[int, int, int], float]  # (example, answer, column) -> log-probability
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Proof:
    """The outcome of a test of a layout.

    `length` is that of the longest text; `difference` is the largest difference of a token's log-probability.
    """

    layout: str
    length: int
    difference: float | None  # None: the model raises an error in this layout
    tolerance: float
    exact: bool
    why: str = ""


@torch.no_grad()
def plain(model: torch.nn.Module, examples: Sequence[Example], prompt_loss: bool = False) -> Tokens:
    """Return the log-probability of each predicted token in plain passes, under the keys of `packing.pack`."""
    expected: Tokens = {}
    for index, example in enumerate(examples):
        for answer, start, ids, labels in _texts(example, index, len(examples), prompt_loss):
            logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float()
            next_ids = torch.tensor(ids[1:], device=logits.device)[:, None]
            logps = logits[:-1].log_softmax(-1).gather(1, next_ids)[:, 0].tolist()
            for position in range(1, len(ids)):
                if labels[position] != -100:
                    key = (index, answer, position - start) if position >= start else (index, -1, position)
                    expected[key] = logps[position - 1]
    return expected


def _texts(
    example: Example, index: int, count: int, prompt_loss: bool
) -> Iterable[tuple[int, int, list[int], list[int]]]:
    """Yield (answer, where it starts, ids, labels) of an example's texts."""
    if "input_ids" in example:
        yield -1, 0, example["input_ids"], example["labels"]
        return
    prompt = example["prompt_ids"]
    for part, kind in enumerate(("chosen_ids", "rejected_ids")):
        prompt_labels = prompt if prompt_loss and part == 0 else [-100] * len(prompt)
        yield index + part * count, len(prompt), prompt + example[kind], prompt_labels + example[kind]


@torch.no_grad()
def laid(
    model: torch.nn.Module, examples: Sequence[Example], layout: Layout, hidden: int, prompt_loss: bool = False
) -> Tokens:
    """Return the log-probability of each predicted token in a layout's hardest case: one row, or one padded pass."""
    layout = replace(layout, filled=0.0)
    packed = _to(packing.pack(examples, layout, hidden, prompt_loss), next(model.parameters()).device)
    log_probs = packing.log_probs(model, packed, layout).log_probs
    assert log_probs is not None, "TRL computes them wherever a token is predicted"
    values = log_probs[0].float().tolist()
    keys = zip(*(packed[k].tolist() for k in ("example", "answer", "column")), strict=True)
    return dict(zip(keys, values, strict=True))


def _to(value: Any, device: torch.device) -> Any:
    """Move all tensors in a value to a device."""
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def difference(measured: Tokens, expected: Tokens) -> float:
    """Return the largest difference of a token's log-probability; infinite if a token is missing or a value is NaN."""
    if measured.keys() != expected.keys():
        return float("inf")
    worst = max((abs(measured[k] - expected[k]) for k in expected), default=0.0)
    return worst if worst == worst else float("inf")


# --- choosing ------------------------------------------------------------------------------------------------------


def candidates(model: PreTrainedModel, packed: bool, attention: str, examples: Sequence[Example]) -> list[Layout]:
    """Return the layouts to try on a base for these examples, cheapest first.

    `attention` is the recipe's. Packed rows need layers that masks describe, or that see all of a text if attention is by
    text.
    """
    own = model.config._attn_implementation
    reaches = families.reaches(model.config)
    sizes = [_tokens(e) for e in examples]
    shape = (sum(sizes) / len(sizes), "prompt_ids" in examples[0], sum(p.numel() for p in model.parameters()))
    kinds = _attentions(attention, own, *shape)
    if BY_TEXT in kinds and not families.whole(reaches, _longest_text(examples)):
        kinds = [kind for kind in kinds if kind != BY_TEXT] or [own]
    reached = reaches or {"": families.Reach()}
    layouts: list[Layout] = []
    if packed and reaches is not None:
        step = packing.BLOCK if torch.cuda.is_available() else 1
        layouts = [Layout("packed", head, reached, kind, step) for kind in kinds for head in ("fused", "whole")]
    last = FLEX if attention == FLEX else own
    return layouts + [Layout(rows, head, reached, last) for rows in ("padded", "single") for head in ("fused", "whole")]


_COMPILED = 1e8  # parameters from which on FlexAttention's kernels are worth the seconds that compiling them takes
_CALLED = 64  # tokens of a text from which on, on a CPU, an attention of its own costs less than what a mask would hide


def _attentions(asked: str, own: str, tokens: float, pairs: bool, parameters: int) -> list[str]:
    """Return the implementations to try: the one that is asked for; for "auto", by device, rows and size of the model."""
    if asked != "auto":
        return [own if asked == "sdpa" else asked]
    if own != "sdpa":  # such a family has an attention of its own
        return [own]
    if not torch.cuda.is_available():
        return [BY_TEXT, own] if tokens >= _CALLED else [own]
    if parameters < _COMPILED:
        return [BY_TEXT, own]
    return [FLEX, BY_TEXT, own] if pairs else [BY_TEXT, FLEX, own]


def _longest_text(examples: Sequence[Example]) -> int:
    """Return a length that no text exceeds, in tokens. KTO pairs a prompt with another row's answer."""
    if "prompt_ids" not in examples[0]:
        return max(map(longest, examples))
    answers = max(len(e[kind]) for e in examples for kind in ("chosen_ids", "rejected_ids") if kind in e)
    return max(len(e["prompt_ids"]) for e in examples) + answers


def _tokens(example: Example) -> int:
    return sum(len(example[k]) for k in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if k in example)


def choose(
    name: str,
    model: torch.nn.Module,
    base: PreTrainedModel,
    layouts: list[Layout],
    examples: Sequence[Example],
    prompt_loss: bool,
    at_once: int,
    remembered: "Memory",
    autocast: Autocast = contextlib.nullcontext,
) -> tuple[Layout, Proof]:
    """Return the first of the layouts that is exact for the model on the longest examples, and its proof.

    UserError if none is. `model` is the base with its adapter, `name` the user's name for it; a micro-batch has
    `at_once` examples. Proofs are looked up in `remembered`, and added to it.
    """
    some = sorted(examples, key=lambda e: -longest(e))
    count = min(_SHOWN, at_once, len(some))
    some = some[: max(1, count - 1)] + (some[-1:] if count > 1 else [])
    check = _Check(model, base, some, prompt_loss, autocast)
    causal = remembered.get("causal", 1, check.length)
    if causal is None:
        remembered.put("causal", 1, causal := check.causal())
    if not causal.exact:
        raise UserError(f"model={name}: {causal.why}")
    missed: list[Proof] = []
    for layout in layouts:
        named = f"{layout.name}, {layout.attention}" + (", prompts too" if prompt_loss else "")
        proof = remembered.get(named, count, check.length)
        if proof is None:
            proof = check(layout)
            remembered.put(named, count, proof)
        if proof.exact:
            if missed and missed[0].layout != layout.name:
                _say(name, layout, f"{missed[0].layout}: {miss(missed[0])}")
            elif families.reaches(base.config) is None:
                _say(name, layout, "a layer carries a state from text to text")
            return layout, proof
        missed.append(proof)
    tried = "; ".join(f"{p.layout}: {miss(p)}" for p in missed)
    raise UserError(f"model={name}: no layout of its rows gives what plain passes of single texts give ({tried})")


def miss(proof: Proof) -> str:
    """Say in a few words how a layout failed."""
    if proof.difference is None:
        return proof.why
    return f"a token's log-probability is off by {proof.difference:.2g}" + (f" ({proof.why})" if proof.why else "")


_said: set[tuple[str, str]] = set()


def _say(name: str, layout: Layout, why: str) -> None:
    """Print a line, once a process, about a layout that is not the one that was asked for."""
    if (name, layout.name) not in _said:
        _said.add((name, layout.name))
        print(f"{name}: texts are laid {layout.name} ({why})", file=sys.stderr)


class _Check:
    """Tests layouts of a model on some examples.

    Values that do not depend on the layout are computed once, when they are needed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: PreTrainedModel,
        examples: Sequence[Example],
        prompt_loss: bool,
        autocast: Autocast,
    ) -> None:
        self.model, self.base, self.autocast = model, base, autocast
        self.examples, self.prompt_loss = examples, prompt_loss
        self.hidden = base.config.get_text_config().hidden_size
        self.length = max(longest(e) for e in examples)
        self._expected: Tokens | None = None
        self._noise: float | None = None

    def __call__(self, layout: Layout) -> Proof:
        """Compare a layout with plain passes."""
        tolerance = EXACT
        if self.base.dtype != torch.float32:
            tolerance = min(_COARSE, max(_LEAST, _NOISE * self.noise))
        try:
            with families.attention(self.base, layout.attention), self.autocast():
                measured = laid(self.model, self.examples, layout, self.hidden, self.prompt_loss)
            off = difference(measured, self.expected)
            why = ""
            if off <= tolerance and self.base.dtype != torch.float32:
                off_structure, why = structure(self.base.config, layout, self.length, self.prompt_loss)
                if off_structure > EXACT:
                    return Proof(layout.name, self.length, off_structure, EXACT, False, why)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a family's code raises over a mask or positions that it does not know
            line = next(iter(str(error).strip().splitlines()), "")
            return Proof(layout.name, self.length, None, tolerance, False, f"{type(error).__name__}: {line[:120]}")
        return Proof(layout.name, self.length, off, tolerance, off <= tolerance, why)

    def causal(self) -> Proof:
        """Test that later tokens change no earlier logits in a plain pass, and that a gradient reaches the adapter."""
        example = max(self.examples, key=longest)
        ids = example["input_ids"] if "input_ids" in example else example["prompt_ids"] + example["chosen_ids"]
        half, device = -(-len(ids) // 2), next(self.model.parameters()).device
        with self.autocast():
            part = self.model(input_ids=torch.tensor([ids[:half]], device=device)).logits[0]
            if not part.requires_grad:
                return Proof("causal", self.length, None, EXACT, False, "no gradient reaches an adapter")
            with torch.no_grad():
                full = self.model(input_ids=torch.tensor([ids], device=device)).logits[0]
        tolerance = EXACT if self.base.dtype == torch.float32 else _COARSE
        change = off(part.detach(), full[:half])
        why = "" if change <= tolerance else f"no causal language model: a token's log-probability is off by {change:.2g} when more text follows"  # fmt: skip
        return Proof("causal", self.length, change, tolerance, change <= tolerance, why)

    @property
    def expected(self) -> Tokens:
        """Return the log-probabilities of plain passes."""
        if self._expected is None:
            with self.autocast():
                self._expected = plain(self.model, self.examples, self.prompt_loss)
        return self._expected

    @property
    def noise(self) -> float:
        """Return the difference that padding alone makes in bfloat16, which is its rounding.

        0 if the model can't be padded.
        """
        if self._noise is None:
            padded = Layout("padded", attention=self.base.config._attn_implementation)
            try:
                with self.autocast():
                    measured = laid(self.model, self.examples, padded, self.hidden, self.prompt_loss)
                self._noise = difference(measured, self.expected)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the family can't be padded: the error is reported when that layout is tried
                self._noise = 0.0
        return self._noise


# --- bfloat16: the structure, in float32 ---------------------------------------------------------------------------


def structure(config: PretrainedConfig, layout: Layout, length: int, prompt_loss: bool) -> tuple[float, str]:
    """Test a layout on a small random model with the same config, in float32: (largest difference, what was done).

    Rounding in bfloat16 could hide a layout's error. The small model has the same kinds of layers, windows and
    positions, and in float32 the error is visible.
    """
    if layout.rows == "single" and layout.head == "whole":
        return 0.0, ""
    no_copy = layout.attention == FLEX or (layout.attention == BY_TEXT and torch.cuda.is_available())
    attention = "sdpa" if no_copy else layout.attention  # kernels of a GPU that have no float32
    with torch.random.fork_rng():
        model = _small_model(config, "sdpa" if attention == BY_TEXT else attention)
        sizes = ((length // 2, length - length // 2, 9), (7, 12, 5), (3, 2, 4))
        examples = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(_ids, s), strict=True)) for s in sizes]
    add_fused_lm_head(model)
    layout = Layout(layout.rows, layout.head, layout.reaches, attention)
    with families.attention(model, attention):
        measured = laid(model, examples, layout, config.get_text_config().hidden_size, prompt_loss)
    return difference(measured, plain(model, examples, prompt_loss)), "shown on a small copy in float32"


def _small_model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Return a small random model of the same family in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(config), attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:  # usual initial weights are so small that nearly uniform outputs would hide differences
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _ids(count: int) -> list[int]:
    """Return random token ids, at least one."""
    return torch.randint(3, _SMALL_VOCABULARY, (max(count, 1),)).tolist()


_SMALL_VOCABULARY, _SMALL_LAYERS, _SMALL_WIDTH = 512, 4, 128


def small(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config's text part with few layers (of all kinds), few tokens and narrow feed-forward parts."""
    text = copy.deepcopy(config.get_text_config())
    layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None) or [""]
    covering = next(i for i in range(1, len(types) + 1) if set(types[:i]) == set(types))
    count = min(layers, max(2, covering if len(types) > 1 else _SMALL_LAYERS))
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, value[:count])
        elif "intermediate_size" in key and isinstance(value, int):
            setattr(text, key, min(value, _SMALL_WIDTH))
        elif key.endswith("_token_id"):
            setattr(text, key, None)
    text.num_hidden_layers, text.vocab_size = count, min(text.vocab_size, _SMALL_VOCABULARY)
    text.dtype = torch.float32
    return text


# --- batches of an evaluation --------------------------------------------------------------------------------------


Side = Literal["left", "right", "leaving"]
_BATCHES: dict[Side, str] = {
    "left": "batch padded on the left",
    "right": "batch padded on the right",
    "leaving": "batch padded on the left that texts leave, its attention by rows",
}


def batch(
    model: torch.nn.Module, base: PreTrainedModel, prompts: Sequence[list[int]], side: Side, memory: "Memory"
) -> Proof:
    """Test whether texts in a padded batch get what each gets alone.

    Padded on the "left" as for generation, on the "right" as for likelihoods; "leaving" is the left with `decoding`
    instead of `generate`. `prompts` are the ids of all texts; the longest and the shortest are tried.
    """
    ordered = sorted(prompts, key=len)
    some = [*ordered[:2], *ordered[-2:]] if len(ordered) > 3 else ordered
    name, length = _BATCHES[side], len(some[-1])
    if remembered := memory.get(name, len(some), length):
        return remembered
    compare = {"left": _next_logits, "right": _all_logits, "leaving": _decoded_logits}[side]
    proof = _batch(name, model, base, some, compare)
    memory.put(name, len(some), proof)
    return proof


def _batch(name: str, model: torch.nn.Module, base: PreTrainedModel, some: list[list[int]], compare: Callable) -> Proof:
    """Compare the two longest and two shortest texts in one batch with each of them alone."""
    length, tolerance = len(some[-1]), EXACT
    try:
        off = compare(model, base, some)
        if base.dtype != torch.float32:  # other shapes round otherwise: what is small is seen on a small copy
            tolerance = _COARSE
            with torch.random.fork_rng():
                small_model = _small_model(base.config, base.config._attn_implementation)
                structural = compare(small_model, small_model, [_ids(len(ids)) for ids in some])
            if structural > EXACT:
                return Proof(name, length, structural, EXACT, False, "shown on a small copy in float32")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's code raises over padding
        line = next(iter(str(error).strip().splitlines()), "")
        return Proof(name, length, None, tolerance, False, f"{type(error).__name__}: {line[:120]}")
    return Proof(name, length, off, tolerance, off <= tolerance)


@torch.no_grad()
def _next_logits(model: torch.nn.Module, base: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Return the largest difference over the first tokens of greedy answers, up to the first token that differs."""
    ids, mask = _left_padded(model, prompts)
    together = _greedy(model, ids, mask)
    tokens = together.sequences[:, ids.shape[1] :].tolist()
    steps = [[(logits[row], tokens[row][s]) for s, logits in enumerate(together.logits)] for row in range(len(ids))]
    return _off_alone(model, prompts, steps)


@torch.no_grad()
def _decoded_logits(model: torch.nn.Module, base: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Return the same for `decoding`: texts leave the batch after different numbers of tokens, the shortest first."""
    together: list[_Steps] = [[] for _ in prompts]
    with decoding.prepared(model, base):
        _decode(decoding.Batch(model, base, *_left_padded(model, prompts)), together)
    return _off_alone(model, prompts, together)


def _decode(batch: decoding.Batch, together: "list[_Steps]") -> None:
    """Decode a few tokens of each text, and add them to `together`; the texts leave one by one."""
    for step in range(_STEPS):
        logits = batch.step() if step else batch.prompts()
        tokens = logits.argmax(-1)
        for row, row_logits, token in zip(batch.rows, logits, tokens.tolist(), strict=True):
            together[row].append((row_logits, token))
        batch.append(tokens)
        if len(batch.rows) > 1 and step:
            batch.leave([row == min(batch.rows) for row in batch.rows])


def _left_padded(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each (prompts, tokens)."""
    longest_prompt, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[0] * (longest_prompt - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest_prompt - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


_Steps = list[tuple[torch.Tensor, int]]  # of an answer's tokens: logits (vocabulary), and the token that was taken


def _off_alone(model: torch.nn.Module, prompts: list[list[int]], together: list[_Steps]) -> float:
    """Compare each prompt's logits with those of the prompt alone in `generate`, as long as the tokens are the same."""
    worst, device = 0.0, next(model.parameters()).device
    for prompt, steps in zip(prompts, together, strict=True):
        one = torch.tensor([prompt], device=device)
        alone = _greedy(model, one, torch.ones_like(one))
        tokens = alone.sequences[0, len(prompt) :].tolist()
        for (batched, token), (single,), its_token in zip(steps, alone.logits, tokens, strict=False):
            worst = max(worst, off(batched, single))
            if token != its_token:  # of equal likelihoods either; and `generate` takes no end so early
                break
    return worst


def _greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Generate a few tokens with their logits."""
    fixed = {"min_new_tokens": _STEPS, "max_new_tokens": _STEPS, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **fixed)


_STEPS = 4


@torch.no_grad()
def _all_logits(model: torch.nn.Module, base: PreTrainedModel, texts: list[list[int]]) -> float:
    """Return the largest difference at any token of texts padded on the right without a mask, as the harness does it."""
    length, device = max(map(len, texts)), next(model.parameters()).device
    together = model(input_ids=torch.tensor([t + [0] * (length - len(t)) for t in texts], device=device)).logits
    alone = [model(input_ids=torch.tensor([t], device=device)).logits[0] for t in texts]
    return max(off(together[i, : len(t)], alone[i]) for i, t in enumerate(texts))


def off(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a log-probability that is at least -20; infinite if one is NaN."""
    logps, expected_logps = (x.float().log_softmax(-1) for x in (logits, expected))
    worst = float((logps - expected_logps).abs().masked_fill(expected_logps < -20, 0).max())
    return worst if worst == worst else float("inf")


# --- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Proofs on disk, one file each, by model (its identity), device and versions of packages."""

    folder: Path
    model: dict[str, Any]

    def get(self, name: str, count: int, length: int) -> Proof | None:
        """Return the proof for this many texts, if it covers the length: a success covers shorter texts, a failure
        longer ones.
        """
        try:
            proof = Proof(**json.loads(self._file(name, count).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        covers = length <= proof.length if proof.exact else length >= proof.length
        return proof if covers else None

    def put(self, name: str, count: int, proof: Proof) -> None:
        """Write a proof."""
        write_json(self._file(name, count), asdict(proof))

    def _file(self, name: str, count: int) -> Path:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        identity = {
            "layout": name,
            "count": count,
            "model": self.model,
            "device": device,
        }
        return self.folder / f"{digest(identity | {p: version(p) for p in _PACKAGES})}.json"
