"""Benchmark kind `choice`: the likeliest of given choices is the right one, as lm-evaluation-harness has multiple choice.

`acc` ranks choices by log-likelihood, `acc_norm` by log-likelihood per character.
"""

from d2lora.scoring.kinds import MultipleChoice

CHOICE = MultipleChoice("choice", ("acc", "acc_norm"))
