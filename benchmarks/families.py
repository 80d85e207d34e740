"""Test which of transformers' text families d2lora can train and evaluate, and how, with tiny random models.

    python benchmarks/families.py [--only NAME...] [--jobs 2] [--csv FILE] [--markdown docs/models.md]

Each configuration is saved, loaded and trained by SFT, DPO and ORPO as `run.py` does it (two steps of four examples,
all linear layers, an adapter that is not zero). The table has the layout that was used, and the distance of the
adapters from those of plain training: each text in a forward pass of its own, the model's own head. Then the saved
adapter is loaded again, merged if that is exact, and a padded batch of an evaluation is compared with single texts.

`--decoding` trains nothing: it counts whose answers `d2lora/layouts/decoding.py` decodes, and not transformers' `generate`.
"""

# ruff: noqa: E402 (the path and the environment are set before what reads them is imported)
import argparse
import contextlib
import csv
import functools
import io
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch
import transformers
from configurations import configurations
from hydra import compose, initialize_config_dir
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from d2lora.adapters import attach, coverage
from d2lora.adapters.start import Start
from d2lora.base import Base, read_base
from d2lora.command import grid
from d2lora.data import Subset
from d2lora.errors import UserError
from d2lora.layouts import batches, choice, decoding, proof
from d2lora.layouts.packing import Layout
from d2lora.plan import Cell
from d2lora.settings import Model, Recipe
from d2lora.stages.adapt import AdaptSpec
from d2lora.train import training

SCALE = 4  # a model without opinions hides what it is given: fresh weights are that much larger
METHODS = ("sft", "dpo", "orpo")
SETTINGS = [
    "method.epochs=1", "recipe.batch=4", "recipe.micro_batch=2", "recipe.schedule=constant", "recipe.max_length=512",
    "recipe.lora.r=4", "recipe.lora.alpha=4", *(f"recipe.lr.{method}=2e-3" for method in METHODS),
]  # fmt: skip


@dataclass
class Row:
    """A configuration's line of the table."""

    family: str
    attention: str = ""
    adapted: str = ""
    sft: str = ""
    dpo: str = ""
    orpo: str = ""
    furthest: str = ""  # relative distance of an adapter from the one of plain training
    evaluated: str = ""
    batch: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Tell whether the model is exact or refused, that is, not silently wrong."""
        return not self.furthest or float(self.furthest) < 5e-3


def build(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model with seeded random weights, with sdpa unless its family has none."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "A_log" not in name:
                weight *= SCALE
    return model


def pairs(count: int = 8) -> list[dict[str, list[int]]]:
    """Return pairs whose texts (prompt and answer) have 18 to 60 tokens."""
    random = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(3, 1000, (length,), generator=random).tolist()

    return [{"prompt_ids": ids(10, 30), "chosen_ids": ids(8, 30), "rejected_ids": ids(8, 30)} for _ in range(count)]


def cell(method: str) -> Cell:
    """Return a cell of the default recipe, with batches of four examples in two micro-batches."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return grid.cell_of(compose("config", overrides=[f"method={method}", *SETTINGS]))


def recipe() -> Recipe:
    """Return the default recipe, with batches of four examples in two micro-batches."""
    return cell(METHODS[0]).config.recipe


@functools.cache
def spec_of(method: str) -> AdaptSpec:
    """Return the spec of a training; a model is identified by its type alone."""
    adapt = cell(method).chain.adapt
    assert adapt is not None, "n is above 0"
    return replace(adapt.spec, model={"dtype": "float32"})


def loaded(name: str, config: PretrainedConfig, folder: Path) -> Base:
    """Save the configuration's model with the lab's tokenizer, and load it as a run does."""
    build(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base").save_pretrained(folder / "model")
    return read_base(Model(name=name, path=str(folder / "model")), folder)


def trained(
    base: Base, method: str, folder: Path, settings: Recipe, layout: Layout | None = None
) -> tuple[dict, dict, dict]:
    """Train, and return (metrics, adapter before, adapter after). A `layout` is used without the usual test."""
    drawn, spec = Subset(pairs(), list(range(8)), []), spec_of(method)
    attach.check_round_trip(base, Start(spec.lora, spec.init, spec.seed), spec.model, folder.parent / "proofs")
    forced = mock.patch.object(choice, "candidates", return_value=[layout]) if layout else contextlib.nullcontext()
    with attach.adapter(base, Start(spec.lora, spec.init, spec.seed), None) as wrapped, forced:
        torch.manual_seed(1)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:  # as after a warm-up
                torch.nn.init.normal_(weight, std=0.05)
        before = weights(wrapped)
        arguments = (folder / "checkpoints", lambda done, total: None, folder / "reference", folder / "proofs")
        metrics = training.train(base, wrapped, drawn, spec, settings, *arguments)
        after, saved = weights(wrapped), attach.save(base, wrapped, folder / "record")
        metrics["coverage"] = coverage.of(wrapped)
    attach.check_saved(base, saved, folder / "record")
    return metrics, before, after


def weights(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in wrapped.named_parameters() if "lora_" in name}


def distance(adapter: dict, expected: dict, start: dict) -> float:
    """Return the distance of two adapters, relative to the change that was learned."""
    apart = sum(float((adapter[k] - w).square().sum()) for k, w in expected.items())
    learned = sum(float((w - start[k]).square().sum()) for k, w in expected.items())
    return (apart / learned) ** 0.5


def measure(name: str, make: Callable[[], PretrainedConfig], settings: Recipe, every: bool) -> Row:
    """Return a configuration's row of the table.

    With `every`, all methods are compared with plain training, else one of them.
    """
    row, furthest = Row(name), 0.0
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(temporary)
        with refusal(row, "loading", folder):
            base = loaded(name, make(), folder)
            row.attention = base.model.config._attn_implementation
        if row.refused:
            return row
        compared = METHODS if every else [METHODS[sum(map(ord, name)) % 3]]
        for method in METHODS:
            with refusal(row, method):
                metrics, start, adapter = trained(base, method, folder / method, settings)
                setattr(row, method, metrics["layout"]["layout"])
                row.adapted = f"{100 * metrics['coverage'].share:.0f} %"
                if method in compared:
                    plain = Layout("single", "whole", attention=row.attention)
                    _, _, right = trained(base, method, folder / f"{method} plain", settings, plain)
                    furthest = max(furthest, distance(adapter, right, start))
                    row.furthest = f"{furthest:.0e}"
        with refusal(row, "evaluation"):
            evaluated(base, folder / "sft" / "record" / "adapter", row, folder)
    return row


def evaluated(base: Base, adapter: Path, row: Row, folder: Path) -> None:
    """Fill in how the adapter is evaluated: merged or not, and in batches or one by one."""
    if not adapter.exists():
        return
    with attach.trained(base, adapter) as (tested, _):
        row.evaluated = "beside the base" if isinstance(tested, PeftModel) else "merged"
        memory = proof.Memory(folder / "proofs", {})
        prompts = [pair["prompt_ids"] for pair in pairs()]
        exact = {side: batches.check(tested, base.model, prompts, side, memory).exact for side in ("left", "right")}
        row.batch = {(True, True): "any", (False, False): "1"}.get((exact["left"], exact["right"]), "generation 1" if exact["right"] else "likelihoods 1")  # fmt: skip


def decoded(make: Callable[[], PretrainedConfig]) -> str:
    """Say how a configuration's answers are decoded."""
    model, prompts = build(make()), [pair["prompt_ids"] for pair in pairs()]
    if not decoding.suits(model):
        return "generate"
    with tempfile.TemporaryDirectory() as folder:
        exact = batches.check(model, model, prompts, "leaving", proof.Memory(Path(folder), {})).exact
    return "decoding" if exact else "generate: not exact in a batch that texts leave"


@contextlib.contextmanager
def refusal(row: Row, what: str, folder: Path | None = None) -> Iterator[None]:
    """Record an error inside the `with` block in the row, without a `folder`'s name: a UserError as it is, others by
    their first line.
    """
    try:
        yield
    except UserError as error:
        row.refused[what] = str(error).replace(str(folder), "FOLDER") if folder else str(error)
    except Exception as error:
        row.refused[what] = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )


def markdown(rows: list[Row]) -> str:
    """Return the page with all rows."""
    wrong = [row.family for row in rows if not row.right]
    refused = [row for row in rows if row.refused]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = [
        "# Models",
        "",
        f"{len(rows)} tiny random models of transformers' text families ({versions}), each trained by SFT, DPO and ORPO and evaluated",
        "as a run does it. Made by `python benchmarks/families.py --markdown docs/models.md`, not by hand.",
        "",
        f"**Silently wrong: {len(wrong)}{' (' + ', '.join(wrong) + ')' if wrong else ''}.** Exact: {len(rows) - len(wrong) - len(refused)}. "
        f"Refused with an error line, for all methods or some: {len(refused)}.",
        "",
        "`packed` puts several texts into a row, and a pair's prompt only once; `padded` gives each text a row and `single` a forward pass, for",
        "layers that carry a state or have positions of their own; `whole logits` is the model's own head instead of TRL's fused one. `adapted` is",
        "the share of the weights that all-linear includes; `from plain` the distance of an adapter from that of plain training, relative to the",
        "change that was learned; `batch` says how an evaluation's texts are batched: any batch, `generation 1` (one by one in generation) or 1.",
        "[training.md](training.md) says how a layout is tested.",
        "",
        "| configuration | attention | adapted | SFT | DPO | ORPO | from plain | evaluated | batch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row) for row in rows if row.furthest]
    if refused:
        lines += ["", "## Refused", "", "| configuration | what | why |", "| --- | --- | --- |"]
        lines += [f"| {row.family} | {what} | {_cell(why)} |" for row in refused for what, why in row.refused.items()]
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    cells = (row.family, row.attention, row.adapted, row.sft, row.dpo, row.orpo, row.furthest, row.evaluated, row.batch)
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")[:300]


def _one(task: tuple[str, bool]) -> Row:
    name, every = task
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    return measure(name, configurations()[name], recipe(), every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations")
    parser.add_argument(
        "--every", action="store_true", help="compare all methods with plain training, not one of the three"
    )
    parser.add_argument("--decoding", action="store_true", help="count how answers are decoded, and train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--csv", type=Path, help="write the table here, too")
    parser.add_argument("--markdown", type=Path, help="write it as a page here, too")
    args = parser.parse_args()
    everything = configurations()
    if unknown := [name for name in args.only or () if name not in everything]:
        parser.error(f"no configuration is named {', '.join(unknown)}; there are: {', '.join(everything)}")
    names, rows, clock = args.only or list(everything), [], time.monotonic()
    if args.decoding:
        transformers.logging.set_verbosity_error()
        print(*(f"{count:>4} {how}" for how, count in Counter(decoded(everything[n]) for n in names).items()), sep="\n")
        return
    with get_context("spawn").Pool(args.jobs) as pool:
        for row in pool.imap(_one, [(name, args.every) for name in names]):
            rows.append(row)
            print(
                f"{len(rows):>3} of {len(names)}, {time.monotonic() - clock:4.0f} s  {row.family}",
                file=sys.stderr,
                flush=True,
            )
    table = io.StringIO()
    writer = csv.DictWriter(table, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    print(table.getvalue(), end="")
    if args.csv:
        args.csv.write_text(table.getvalue())
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if wrong := [row.family for row in rows if not row.right]:
        sys.exit(f"silently wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
