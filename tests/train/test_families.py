"""The tiny configurations of transformers' families, which docs/models.md is made from."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import families
from configurations import configurations

CONFIGURATIONS = configurations()


def test_at_least_120_configurations_and_each_has_its_own_name() -> None:
    configs = [make() for make in CONFIGURATIONS.values()]
    assert len(configs) >= 120
    assert len({config.model_type for config in configs}) >= 110
    assert len({config.to_json_string() for config in configs}) == len(configs), "two names for one configuration"


@pytest.fixture(scope="module")
def settings():
    return families.recipe()


# (configuration, layout under SFT, DPO and ORPO, how it is evaluated, batches)
EXPECTED = [
    ("mistral sw8", "packed", "merged", "any"),  # one mask with a window
    ("gemma3 sw8", "packed", "merged", "any"),  # a mask for each type of layer
    ("gemma2 sw8", "packed", "merged", "any"),  # no sdpa: its own attention adds numbers
    ("mixtral", "packed", "merged", "any"),  # experts as parameters, a router's loss that TRL would turn on
    ("phimoe", "packed", "merged", "any"),  # its router draws random numbers in training, and takes no adapter
    ("gpt2", "packed", "merged", "any"),  # dropout of its own
    ("modernbert-decoder lw8", "packed, whole logits", "merged", "any"),  # does more than a product in its head
    ("lfm2", "padded", "merged", "any"),  # convolutions
    ("falcon_h1", "padded", "merged", "any"),  # layers that PEFT refuses
    ("zamba2", "padded", "beside the base", "any"),  # two adapters on one weight: merged, each would get both
    ("minimax", "padded", "merged", "generation 1"),  # answers otherwise in a padded batch
]


@pytest.mark.parametrize(("name", "layout", "evaluated", "batch"), EXPECTED, ids=[e[0] for e in EXPECTED])
def test_each_family_trains_as_plain_passes_do_and_is_evaluated_as_it_was_trained(
    settings, name: str, layout: str, evaluated: str, batch: str
) -> None:
    row = families.measure(name, CONFIGURATIONS[name], settings, every=False)
    assert not row.refused
    assert {row.sft, row.dpo, row.orpo} == {layout}
    assert float(row.furthest) < 1e-3
    assert (row.evaluated, row.batch) == (evaluated, batch)


def test_a_model_that_sees_what_follows_is_refused(settings) -> None:
    row = families.measure("cpmant", CONFIGURATIONS["cpmant"], settings, every=False)
    assert row.refused.keys() == {"sft", "dpo", "orpo"}
    assert all("model=cpmant: no causal language model" in why for why in row.refused.values())
