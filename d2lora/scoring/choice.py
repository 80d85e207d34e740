"""Benchmark kind `choice`: the likeliest of the item's choices must be the right one, as lm-evaluation-harness scores
multiple choice.

`acc` ranks the choices by log-likelihood, `acc_norm` by log-likelihood per character.
"""

from d2lora.scoring.kinds import MultipleChoice

CHOICE = MultipleChoice("choice", ("acc", "acc_norm"))
