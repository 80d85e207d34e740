#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0
#
# What happens: on a CPU, dequantize_4bit scales values by the maximum of another block where a matrix's rows are no multiple of the
# block size long (64 by default). The error of the round trip is many times that of the same values as one row.
#
# What one would expect: quantize_4bit counts blocks over the flattened values, whatever their shape, so both give the same.
#
# Why it hurts: a layer of such a size (adapters' own sizes, small models, experts) is another one after loading in 4 bits on a
# CPU than on a GPU, and LoftQ's remainder W - Q, which the adapter is to take up, is that of a wrong Q.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 bitsandbytes==0.50.2
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")


def error(weight: torch.Tensor) -> float:
    """Return the error of quantizing to NF4 and back, relative to the weight."""
    back = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    return ((back.reshape(weight.shape) - weight).norm() / weight.norm()).item()


off = {}
for columns in (32, 64, 96, 128):
    torch.manual_seed(0)
    weight = torch.randn(64, columns) * torch.logspace(-1, 1, 64)[:, None]  # rows of several sizes, as weights have them
    off[columns] = error(weight), error(weight.reshape(1, -1))
    print(f"rows of {columns}: error {off[columns][0]:.3f}, of the same values as one row {off[columns][1]:.3f}")
print("expected: the same in both, for all")
held = all(off[c][0] == off[c][1] for c in (64, 128)) and all(off[c][0] > 1.5 * off[c][1] for c in (32, 96))
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
