"""Imports follow the flow: configuration, data, training and evaluation, plan, records, report, command."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Files and folders of d2lora/, in an order in which each imports earlier ones only.
ORDER = [
    *("errors", "progress", "collection", "keys", "stats", "scoring", "settings", "outputs", "records", "provenance"),
    *("data", "layouts", "base", "adapters", "train", "evaluate"),
    *("stages", "plan", "store", "report", "mirror", "worker", "command", "lab"),
]
COMMANDS = ["__init__", "__main__", "dashboard", "fetch"]  # what is typed may import anything


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, at its top or later, but not those that only a type checker needs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for part in node.orelse for name in imported(part))
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue  # the file typed as a command
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def test_nothing_imports_against_the_flow() -> None:
    against = []
    for file in sorted((ROOT / "d2lora").rglob("*.py")):
        room = file.relative_to(ROOT / "d2lora").with_suffix("").parts[0]
        if room in COMMANDS or file.name == "__main__.py":
            continue
        for name in imported(ast.parse(file.read_text())):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package == "d2lora" and (other not in ORDER or ORDER.index(other) > ORDER.index(room)):
                against.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not against


def test_the_order_names_every_file_and_folder() -> None:
    rooms = {
        path.stem for path in (ROOT / "d2lora").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rooms |= {path.name for path in (ROOT / "d2lora").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == {*ORDER, *COMMANDS}
