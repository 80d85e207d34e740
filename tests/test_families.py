"""The tiny configurations of transformers' families, which docs/models.md is made from."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import families
from configurations import configurations

CONFIGURATIONS = configurations()


def test_at_least_120_configurations_and_each_has_its_own_name() -> None:
    configs = [make() for make in CONFIGURATIONS.values()]
    assert len(configs) >= 120
    assert len({config.model_type for config in configs}) >= 110
    assert len({config.to_json_string() for config in configs}) == len(configs), "two names for one configuration"


@pytest.mark.parametrize("name", ["llama", "mistral sw8", "gemma2 sw8", "lfm2", "jamba", "gpt2"])
def test_a_configuration_builds_and_its_model_has_opinions(name: str) -> None:
    model = families.build(CONFIGURATIONS[name]())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        log_probs = model(torch.arange(3, 63)[None]).logits.log_softmax(-1)
    assert log_probs.isfinite().all()
    assert log_probs.std() > 0.1
    assert (log_probs[0, 0] - log_probs[0, 1]).abs().max() > 0.1, "each token has its own"


def test_a_window_shorter_than_a_text_is_seen_in_the_table() -> None:
    near, far = (families.measure(name, CONFIGURATIONS[name]) for name in ("mistral sw8", "mistral no window"))
    assert float(near["packed_max_difference"]) > 0.1 > 1e-5 > float(near["padded_max_difference"])
    assert float(far["packed_max_difference"]) < 1e-5
    assert far["greedy_in_a_batch_of_4_same_as_alone"] == "4/4"
