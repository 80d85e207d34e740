"""Keys and numbers are what they were. What moves them on purpose writes them anew: tests/golden/make.py says how."""

from pathlib import Path

import pytest
from golden import make

from d2lora.stages import VERSIONS

ROOT = Path(__file__).parents[2]
# What needs a folder or weights of the user's.
ELSEWHERE = {"math_local", "laptop", "local", "smollm2"}


def differences(golden: dict, found: dict) -> list[str]:
    """What of the cells' keys is another: the cell, the stage, and which parts of the key's content."""
    lines = []
    for cell, stages in golden.items():
        for stage in stages | found[cell]:
            was, now = stages.get(stage, {}), found[cell].get(stage, {})
            if was != now:
                parts = [part for part in was | now if part != "key" and was.get(part) != now.get(part)]
                lines.append(f"{cell}: {stage}: the key is {now.get('key')}, was {was.get('key')}: {', '.join(parts)}")
    return lines


def test_keys_are_what_they_were() -> None:
    golden = make.read("keys")
    assert set(golden) == set(make.KEYS), "python tests/golden/make.py keys"
    lines = differences(golden, make.keys(list(golden)))
    assert not lines, "\n".join(
        [
            f"{len(lines)} keys differ, so all who have such records would make them again:",
            *lines[:20],
            "A new setting must add nothing at its default. If they are to differ: python tests/golden/make.py keys",
        ]
    )


def test_a_key_that_moves_is_named_with_what_moved_it() -> None:
    name = "sft after a warm-up"
    golden = make.keys([name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make.KEYS, name, [*make.KEYS[name], "recipe.lr.sft=0.5"])
        found = make.keys([name])
    lines = differences(golden, found)
    assert [line.split(": ")[1] for line in lines] == ["adapt", "evaluate", "evaluate 2"]
    assert [line.split(": ")[-1] for line in lines] == ["lr", "parent", "parent"]


@pytest.mark.parametrize("group", ["method", "init", "task", "control"])
def test_every_choice_has_a_golden_key(group: str) -> None:
    chosen = {o.split("=")[1] for overrides in make.KEYS.values() for o in overrides if o.startswith(f"{group}=")}
    defaults = {"sft", "lora", "lab_math", "none", "math"}  # math: that of scale=paper
    there = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
    assert there - chosen - defaults - ELSEWHERE == set(), "give tests/golden/make.py a cell with it"


@pytest.mark.parametrize("cell", make.NUMBERS)
def test_numbers_are_what_they_were(cell: str, tiny: Path, tmp_path: Path) -> None:
    golden, found = make.read("numbers")[cell], make.numbers(cell, tiny, tmp_path / "out")
    lines = [f"{cell}: {stage}: {what}" for stage, what in make.moved(cell, golden, found)]
    assert not lines, "\n".join(
        [
            *lines,
            "Either it is a fault, or records made before are no longer right: then raise the first of these stages in",
            f"d2lora.VERSIONS and run: python tests/golden/make.py numbers keys.{make.different_packages()}",
        ]
    )


def test_numbers_that_move_under_the_same_version_are_not_written() -> None:
    """Not those of a stage after one whose version was raised: its key is another already."""
    golden = make.read("numbers")["sft"]
    found = {stage: dict(values) for stage, values in golden.items()}
    found["adapt"]["last loss"] += 1e-3
    found["evaluate"]["loglikelihoods"] += 1
    assert [line.split(": ")[1] for line in make.unexplained("sft", golden, found)] == ["adapt", "evaluate"]
    for stage in ("adapt", "evaluate"):
        found[stage]["versions"] = found[stage]["versions"] | {"adapt": VERSIONS["adapt"] + 1}
    assert make.unexplained("sft", golden, found) == []
    assert [stage for stage, _ in make.moved("sft", golden, found)] == ["adapt", "evaluate"]
