"""Give access to the Hugging Face Hub, and turn its errors into one line of advice."""

from typing import Any


def hub() -> Any:
    """Return huggingface_hub with its own log lines about retries turned off: we print one line about the outcome."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    return huggingface_hub


def hub_problem(key: str, name: str, error: Exception) -> str:
    """Say in one line why the Hub did not deliver, and what to do. `key` and `name` are the setting and its value."""
    chain = _chain(error)
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
    lines = str(error).strip().splitlines() or [""]
    if "GatedRepoError" in kinds or "is a gated dataset" in lines[0]:
        return (
            f"{key}={name}: gated: accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN"
        )
    if (
        kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}
        and "ConnectionError" not in kinds
    ):
        return (
            f"{key}={name}: not on the Hub under this name and revision, or private (then log in with `hf auth login`)"
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"{key}={name}: the Hub has it, but not this file of it: {lines[-1]}"
    if status in (401, 403):
        return f"{key}={name}: the Hub refused the token (status {status}): log in with `hf auth login`, or correct HF_TOKEN"
    if status:
        return f"{key}={name}: not in the local cache, and the Hub answers with status {status}: try again later"
    if kinds & {"ConnectionError", "LocalEntryNotFoundError", "TransportError", "TimeoutError", "Timeout"}:
        return f"{key}={name}: not in the local cache, and the Hub can't be reached: run `python -m d2lora fetch` with the same overrides where there is a network"
    return f"{key}={name}: the Hub's answer was {type(error).__name__}: {lines[0]}"


def _chain(error: BaseException) -> list[Any]:
    """Return an error and all errors that it was raised from or while handling."""
    errors: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        if (e := todo.pop()) is not None and e not in errors:
            errors.append(e)
            todo += [e.__context__, e.__cause__]
    return errors
