"""Declare what a stage takes and makes as W&B's artifacts."""

import json
from typing import Any

from d2lora.keys import Identity
from d2lora.mirror.sender import fit
from d2lora.mirror.values import public_path
from d2lora.settings import Config
from d2lora.stages import Stage
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.warmup import WarmupSpec
from d2lora.store import Store


def lineage(run: Any, config: Config, stage: Stage, store: Store) -> None:
    """Declare a stage's inputs, and its adapter as output, if it has one.

    Inputs are artifacts with content, so that runs can be uploaded in any order: W&B recognizes equal content as the
    same version.
    """
    inputs = [
        _adapter(stage.parent, store) if stage.parent else None,
        _note("base", config.model.name, stage.spec.content()),
    ]
    sources = {WarmupSpec.KIND: config.warmup.name, AdaptSpec.KIND: config.task.name}
    if source := sources.get(stage.kind):
        inputs.append(_note("dataset", source, stage.spec.content()))
    for artifact in filter(None, inputs):
        # run.use_artifact() waits for the server, and refuses to work offline; this is what it does otherwise.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    if adapter := _adapter(stage, store):
        run.log_artifact(adapter)


def _adapter(stage: Stage, store: Store) -> Any:
    """Return a training's adapter, or None. Its files are those of the record, which never change, so they are not copied.

    Its config is copied: it names a local base by its path.
    """
    import wandb

    folder = store.folder(stage) / "adapter"
    if not folder.is_dir():
        return None
    artifact = wandb.Artifact(
        f"{stage.kind}-{stage.key}", "model", description=stage.label, metadata=stage.spec.content()
    )
    for file in sorted(folder.iterdir()):
        if file.name == "adapter_config.json":
            content = json.loads(file.read_text())
            base = public_path(content["base_model_name_or_path"])
            with artifact.new_file(file.name) as copy:
                json.dump(content | {"base_model_name_or_path": base}, copy, indent=2)
        else:
            artifact.add_file(str(file), policy="immutable")
    return artifact


def _note(kind: str, name: str, spec: Identity) -> Any:
    """Return a base or data set as an artifact: its fingerprint (content hashes, or the Hub's name and revision), not its files."""
    import wandb

    identity = spec.get({"base": "model", "dataset": "data"}[kind])
    if identity is None:
        return None
    artifact = wandb.Artifact(fit(f"{kind}-{name}"), kind, metadata=identity)
    with artifact.new_file("identity.json") as file:
        json.dump(identity, file, sort_keys=True)
    return artifact
