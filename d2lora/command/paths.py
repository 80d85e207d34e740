"""Folders as they are typed."""

from pathlib import Path

from d2lora import data


def project_path(typed: str) -> Path:
    """The folder that a typed path means: `~` is the home folder, and a relative path starts in the project's folder."""
    return data.ROOT / Path(typed).expanduser()
