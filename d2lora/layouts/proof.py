"""Keep what tests of layouts found: a layout is used where each token gets the log-probability of a plain pass.

A plain pass is one text in one forward pass: no padding, no mask, no packing, the model's own head. `check.py` tests
layouts of training rows, `batches.py` the batches of an evaluation.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from d2lora.keys import digest
from d2lora.outputs import write_json

EXACT = 1e-3  # nats a token, in float32
COARSE = 1.0  # in bfloat16, where the two passes differ in length or batch size
_PACKAGES = ("torch", "transformers", "peft", "trl")


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

    @classmethod
    def measured(cls, layout: str, length: int, difference: float, tolerance: float, why: str = "") -> "Proof":
        """Return the proof of a layout whose log-probabilities differ by this much from those of plain passes."""
        return cls(layout, length, difference, tolerance, difference <= tolerance, why)

    @classmethod
    def failed(cls, layout: str, length: int, tolerance: float, error: Exception) -> "Proof":
        """Return the proof of a layout in which the model raises this error."""
        line = next(iter(str(error).strip().splitlines()), "")
        return cls(layout, length, None, tolerance, False, f"{type(error).__name__}: {line[:120]}")

    @property
    def miss(self) -> str:
        """Say in a few words how the layout failed."""
        if self.difference is None:
            return self.why
        reason = f" ({self.why})" if self.why else ""
        return f"a token's log-probability is off by {self.difference:.2g}{reason}"


def logits_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a log-probability that is at least -20; infinite if one is NaN."""
    logps, expected_logps = (x.float().log_softmax(-1) for x in (logits, expected))
    worst = float((logps - expected_logps).abs().masked_fill(expected_logps < -20, 0).max())
    return worst if worst == worst else float("inf")


@dataclass(frozen=True)
class Memory:
    """Caches proofs on disk, one file each, by model (its identity), device and versions of packages."""

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

    def remember(self, name: str, count: int, length: int, test: Callable[[], Proof]) -> Proof:
        """Return the proof for this many texts up to a length; of a test that is done now where none is on disk."""
        proof = self.get(name, count, length)
        if proof is None:
            self.put(name, count, proof := test())
        return proof

    def _file(self, name: str, count: int) -> Path:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        identity = {"layout": name, "count": count, "model": self.model, "device": device}
        return self.folder / f"{digest(identity | {p: version(p) for p in _PACKAGES})}.json"
