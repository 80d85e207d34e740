"""Until all have moved."""

from d2lora import worker
from d2lora.outputs import Outputs
from d2lora.stages import rows
from d2lora.worker import do  # noqa: F401

coverage_file = rows.coverage_file


def output(config):
    return Outputs.of(config).root


def failure(config, stage):
    return Outputs.of(config).failed(stage.key)


def report_failure(config, stage, error):
    worker.write_failure(Outputs.of(config), stage.key, stage.label, error)


def write_failure(folder, key, label, error):
    worker.write_failure(Outputs(folder), key, label, error)
