"""The report on made-up records, written through the store and manifests that a run writes them with."""

import csv
import dataclasses
import json
import os
import re
from pathlib import Path

import made
import numpy as np
import pytest
from made import grid

from d2lora import records, report, stats
from d2lora.command import summary
from d2lora.errors import UserError
from d2lora.evaluate.vllm import installed
from d2lora.lab import world
from d2lora.outputs import whole_file, write_text
from d2lora.plan import Cell
from d2lora.records import Records
from d2lora.report import (
    artefacts,
    compare,
    content,
    controls,
    differences,
    evidence,
    figures,
    formats,
    paper,
    sweep_report,
    tables,
    verdict,
)
from d2lora.report import inits as inits_table
from d2lora.report.axes import MACHINE
from d2lora.report.points import Point, points_of
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
SIZES = [0, 1000, 2000, 5000, 10000]
METHODS = ("sft", "dpo", "orpo")


@pytest.fixture(scope="module")
def table3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the paper's Table 3 with its report."""
    output = tmp_path_factory.mktemp("table3")
    cells = grid("scale=paper", methods=METHODS, n=SIZES, m=[0, 40000])
    made.publish(output, cells)
    text = report.write(output, ["mine"])
    assert "SFT D2LoRA(40k, n)" in text
    return output


def points(output: Path, sweep: str = "mine") -> list[Point]:
    return points_of(report.manifest.read_manifest(output, sweep), Records(output))


def read_csv(file: Path) -> list[dict]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_table_3_has_our_values_the_paper_s_and_the_difference(table3: Path) -> None:
    found = read_csv(table3 / "report" / "mine" / "table3.csv")
    assert len(found) == 30
    assert {r["benchmark"] for r in found} == {"gsm8k"}
    row = next(r for r in found if (r["method"], r["m"], r["n"]) == ("dpo", "40000", "2000"))
    assert float(row["paper"]) == pytest.approx(0.8294)
    assert float(row["to_paper"]) == pytest.approx(float(row["value"]) - 0.8294)
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    recorded = json.loads((table3 / "store" / "evaluate" / row["evaluations"] / "record.json").read_text())
    assert float(row["value"]) == pytest.approx(recorded["metrics"]["accuracy"]["value"])
    markdown = (table3 / "report" / "mine" / "table3.md").read_text()
    assert re.search(r"\| paper \| 74\.53 \| 80\.36 \| 81\.88 \| 81\.73 \| 83\.32 \|", markdown)
    assert "D2LoRA beats LoRA in" in markdown
    assert "of 13 cells" in markdown, "the three methods share their cells at n = 0: one comparison"


def test_latex_is_booktabs_and_escaped(table3: Path) -> None:
    for name in ("table3", "table2", "table"):
        text = (table3 / "report" / "mine" / f"{name}.tex").read_text()
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") > 0
        body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert not re.search(r"(?<!\\)[%#]|(?<![\\$])_", body)
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.S):
            lines = [x for x in tabular[1].splitlines() if x.endswith(r"\\")]
            assert {len(re.findall(r"(?<!\\)&", x)) for x in lines} == {len(tabular[0]) - 1}
    assert formats.latex_text("a_b 5% {x} \\") == r"a\_b 5\% \{x\} \textbackslash{}"


def test_figures_1_to_3_are_drawn_three_ways_and_dashed_where_the_paper_has_numbers(table3: Path) -> None:
    folder = table3 / "report" / "mine"
    assert {f.stem for f in folder.glob("*.png")} == {"curves", "differences", "figure1", "figure2", "figure3"}
    assert (folder / "figure2.pdf").read_bytes().startswith(b"%PDF")
    loaded = sweep_report.load(table3, "mine", Records(table3))
    panels = {s.artefact.name: s.content.panels for s in loaded.shown}
    assert [len(panels[f"figure{i}"]) for i in (1, 2, 3)] == [1, 3, 3]
    assert [c.label for c in panels["figure1"][0].curves] == ["SFT LoRA", "DPO LoRA", "ORPO LoRA"]
    assert panels["figure2"][1].curves[1].paper[-1] == (10000, pytest.approx(0.8347))
    assert all(not c.paper for panel in panels["figure3"] for c in panel.curves), "Figure 3 has no numbers in the paper"


@pytest.mark.thorough
def test_curves_can_be_told_apart_however_many_there_are(tmp_path: Path) -> None:
    from matplotlib import pyplot

    inits = ("lora", "gaussian", "milora")
    cells = [c for i in inits for c in grid(f"init={i}", methods=METHODS, n=[8, 16], m=[0, 8, 40])]
    made.publish(tmp_path, cells, items=8)
    shown = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("table")
    figure = figures.curves(shown.panels, pyplot)
    axes = figure.axes
    assert len({axis.get_title() for axis in axes}) == len(axes) == 2 * len(inits) * 2, "one a benchmark, init and m"
    assert {"lab_math, milora, D2LoRA(8, n)", "lab_math, milora, D2LoRA(40, n)"} < {a.get_title() for a in axes}
    for axis in axes:
        looks = {(x.get_color(), x.get_marker(), x.get_linestyle(), x.get_markerfacecolor()) for x in axis.lines}
        assert len(looks) == len(axis.lines) == 6, "three methods, LoRA and one D2LoRA"
    pyplot.close(figure)


def test_the_paper_s_curves_can_be_told_apart_too(table3: Path) -> None:
    from matplotlib import pyplot

    shown = sweep_report.load(table3, "mine", Records(table3)).shown
    for panels in [s.content.panels for s in shown if s.content.panels]:
        figure = figures.curves(panels, pyplot)
        for axis in figure.axes:
            looks = {(x.get_color(), x.get_marker(), x.get_linestyle(), x.get_markerfacecolor()) for x in axis.lines}
            assert len(looks) == len(axis.lines)
        pyplot.close(figure)


def test_lora_stands_beside_each_warmup_set_and_a_model_without_d2lora_alone(tmp_path: Path) -> None:
    cells = [
        c for w in ("mix40k", "mix_math") for c in grid("scale=paper", f"warmup={w}", n=[0, 1000, 2000], m=[0, 2000])
    ]
    cells += grid("scale=paper", "model=llama-3.2-1b", n=[0, 1000, 2000], m=[0])
    made.publish(tmp_path, list({c.id: c for c in cells}.values()), items=8)
    found = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("table").panels
    assert {p.title: [c.label for c in p.curves] for p in found if p.title.startswith("gsm8k")} == {
        "gsm8k, llama-3.1-8b-instruct, mix40k": ["SFT LoRA", "SFT D2LoRA(2k, n)"],
        "gsm8k, llama-3.1-8b-instruct, mix-math": ["SFT LoRA", "SFT D2LoRA(2k, n)"],
        "gsm8k, llama-3.2-1b-instruct": ["SFT LoRA"],
    }


def test_another_model_or_scale_is_not_set_beside_the_paper_s_numbers(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(methods=METHODS, n=[0, 100, 1000], m=[0, 4000]))
    found = points(tmp_path)
    assert paper.select(paper.TABLES[1], found)
    assert all(paper.value(p) is None for p in found)
    made.publish(tmp_path, grid("scale=paper", "model=lab", "sweep=other", n=SIZES, m=[0, 40000]))
    assert all(paper.value(p) is None for p in points(tmp_path, "other"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("override", "beside"),
    [
        ("init=pissa", set()),
        ("recipe=laptop", set()),
        ("task.benchmark.gsm8k.limit=100", set()),
        ("warmup=mix_math", {0}),  # LoRA is the paper's: it knows no warm-up
        ("task.continuation=rest", {0, 40000}),  # the paper does not say which it is
    ],
)
def test_a_cell_that_is_not_the_paper_s_is_not_set_beside_its_number(
    tmp_path: Path, override: str, beside: set
) -> None:
    made.publish(tmp_path, grid("scale=paper", override, n=[1000, 2000], m=[0, 40000]))
    report.write(tmp_path, ["mine"])
    shown = [r for r in read_csv(tmp_path / "report" / "mine" / "table.csv") if r["benchmark"] == "gsm8k"]
    assert {int(r["m"]) for r in shown if r["paper"]} == beside
    assert ("ours - paper" in (tmp_path / "report" / "mine" / "table.md").read_text()) == bool(beside)


def names(output: Path) -> list[str]:
    """What the report shows of a sweep: what it has of the paper's, and its own table."""
    shown = sweep_report.load(output, "mine", Records(output)).shown
    return [s.artefact.name for s in shown if s.content.tables or s.content.panels]


@pytest.mark.parametrize(
    ("overrides", "methods", "m", "found"),
    [
        ([""], ("orpo",), [0, 40000], []),
        ([""], METHODS, [0, 1000, 40000], ["figure1"]),  # it has LoRA alone
        (["warmup=mix40k", "warmup=mix_math"], METHODS, [0, 40000], ["figure1"]),
        (["model=llama", "model=llama-3.2-1b"], METHODS, [0, 40000], []),
        (["init=lora", "init=pissa"], METHODS, [0, 40000], []),
        (["recipe=paper", "recipe=laptop"], METHODS, [0, 40000], []),
    ],
)
def test_a_sweep_over_something_else_is_not_called_table_3(tmp_path: Path, overrides, methods, m, found) -> None:
    cells = [
        c for x in overrides for c in grid("scale=paper", *filter(None, [x]), methods=methods, n=[1000, 2000], m=m)
    ]
    made.publish(tmp_path, list({c.id: c for c in cells}.values()), items=8)
    assert names(tmp_path) == [*found, "table"]


def test_a_part_of_the_grid_gets_its_table_3(tmp_path: Path) -> None:
    made.publish(tmp_path, grid("scale=paper", "init=pissa", methods=METHODS, n=[1000, 5000], m=[0, 40000]), items=8)
    assert names(tmp_path) == ["table3", "figure1", "figure2", "figure3", "table"]


@pytest.mark.usefixtures("undrawn")
def test_table_1_says_the_true_size_of_all(tmp_path: Path) -> None:
    cells = grid("scale=paper", "task=title", n=[0, 1000, "all"], m=[0, 40000])
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    text = (tmp_path / "report" / "mine" / "table1.md").read_text()
    assert "n=all (6,970)" in text
    assert all(f"econ_titles: {metric} in %" in text for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum"))
    assert "31.66" in text, "the paper's 7k is all"
    assert "does not say which ROUGE" in text
    assert "paired bootstrap" in text


def test_figure_4_is_orpo_with_few_samples(tmp_path: Path) -> None:
    cells = grid("scale=paper", methods=("orpo",), n=[100, 200, 500, 1000], m=[0, 40000])
    made.publish(tmp_path, cells, items=20)
    assert names(tmp_path) == ["figure4", "table"]
    figure = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("figure4")
    assert [x for x, _ in figure.panels[0].curves[0].points] == [100, 200, 500, 1000]


@pytest.mark.usefixtures("undrawn")
def test_table_2_shows_what_ran(tmp_path: Path) -> None:
    cells = grid("scale=paper", "task.continuation=rest", methods=("sft", "orpo"), n=[0, 1000], m=[0, 40000])
    cells += grid("scale=paper", methods=("sft",), n=[0, 1000], m=[0, 40000])
    made.publish(tmp_path, cells, items=4)
    text = report.finish(tmp_path, "mine")
    assert "SFT D2LoRA(40k, n) continuation=rest " in text
    table = (tmp_path / "report" / "mine" / "table2.md").read_text()
    assert "| phase 2: lr | 1e-06 | 1e-06 | 1e-06 |" in table
    assert "| beta | N/A | 0.1 | N/A |" in table
    assert "| task.continuation | rest | rest | step |" in table
    assert "| m that ran | 0, 40k | 0, 40k | 0, 40k |" in table


def test_missing_cells_are_shown_as_missing_and_compared_with_nothing(tmp_path: Path) -> None:
    cells = grid(n=[0, 100], m=[0, 4000])
    lost = next(c for c in cells if c.config.n == 100 and c.config.m == 0)
    made.publish(tmp_path, cells, missing=lambda stage: stage in lost.chain.evaluations)
    text = report.finish(tmp_path, "mine")
    assert re.search(r"SFT LoRA\s+\d+\.\d\d ± \d+\.\d\d\s+missing", text)
    assert "of 1 cell;" in text
    assert '"value":null' in (tmp_path / "report" / "index.html").read_text()


def test_seeds_are_folded_and_the_base_stands_for_all(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[0, 100], m=[0, 4000], seed=[0, 1, 2]), items=200)
    found = {(p.m, p.n): p for p in points(tmp_path) if p.metric == "accuracy"}
    assert {place: p.table.shape for place, p in found.items()} == {
        (0, 0): (1, 200),
        (0, 100): (3, 200),
        (4000, 0): (3, 200),
        (4000, 100): (3, 200),
    }
    pairs = compare.comparisons(found.values())
    assert all(c.seeds == (0, 1, 2) and c.test == "two-level bootstrap" for c in pairs.values())
    assert "3 training seeds (0, 1, 2)" in report.finish(tmp_path, "mine", draw=False)
    mean = sum(float(s.mean()) for s in found[4000, 100].scores.values()) / 3
    assert found[4000, 100].value == pytest.approx(mean)


def test_a_seed_that_is_missing_is_said(tmp_path: Path) -> None:
    cells = grid(n=[100, 200], m=[0, 4000], seed=[0, 1])
    made.publish(tmp_path, cells, missing=lambda stage: stage in cells[1].chain.evaluations)
    text = report.finish(tmp_path, "mine", draw=False)
    assert "(1 of 2 seeds)" in text
    said = "2 training seeds (0, 1), folded into each number. Two hardly tell what another would change: intervals are wide."
    assert f"{said} 1 cell with fewer" in " ".join(text.split())


@pytest.mark.parametrize(("effect", "better", "beyond"), [(0.35, 2, 2), (0.0, None, 0)])
def test_the_verdict_tells_a_gain_from_noise(tmp_path: Path, effect: float, better: int | None, beyond: int) -> None:
    cells = grid(n=[100, 200], m=[0, 4000])
    made.publish(tmp_path, cells, items=300, ability=lambda c: 0.4 + (effect if c.config.m else 0))
    table = next(t for t in tables.build(points(tmp_path)) if t.title.startswith("lab_math"))
    assert f"beyond chance in {beyond} (Holm, alpha 5 %)" in table.verdict
    assert "One training seed (0)" in table.verdict
    if better is not None:
        assert table.verdict.startswith(f"D2LoRA beats LoRA in {better} of 2 cells")
    assert ("*" in formats.text(table)) == bool(beyond)


def test_seed_luck_is_not_called_a_gain(tmp_path: Path) -> None:
    """D2LoRA's three runs are 40, 2 and 1 points better than LoRA's: with other seeds it might not be."""
    gains = {0: 0.4, 1: 0.02, 2: 0.01}
    ability = lambda c: 0.4 + (gains[c.config.seed] if c.config.m else 0)  # noqa: E731
    made.publish(tmp_path, grid(n=[100], m=[0, 4000], seed=[0, 1, 2]), items=300, ability=ability)
    pair = compare.comparisons(p for p in points(tmp_path) if p.benchmark == "lab_math").popitem()[1]
    assert pair.p > 0.05
    assert -1 <= pair.interval[0] < 0 < pair.interval[1] <= 1
    assert pair.detectable > 0.4, "what three such runs could show"


def test_four_items_are_no_difference_and_none_is_no_certainty(tmp_path: Path) -> None:
    cells = grid(n=[100], m=[0, 4000])
    made.publish(tmp_path, cells, items=100)
    lora, d2lora = (p for p in points(tmp_path) if p.benchmark == "lab_math")
    for items, few in ((4, True), (0, True), (20, False)):
        lora.scores[0], d2lora.scores[0] = (np.repeat([1.0, 0.0], [x, 100 - x]) for x in (40, 40 + items))
        pair = compare.compared(lora, d2lora)
        assert (pair.interval[0] < 0 < pair.interval[1]) == few
        assert (pair.p > 0.05) == few
        assert pair.detectable > 0.079
    assert "before Holm's correction a cell shows differences from" in verdict.verdict([pair])


@pytest.mark.usefixtures("undrawn")
def test_an_engine_is_named_and_two_are_pointed_out(tmp_path: Path, monkeypatch) -> None:
    asked = {"name": "vllm", "version": "0.32.0", "dtype": "bfloat16"}
    monkeypatch.setattr(installed, "identity", lambda config: asked if config.recipe.engine == "vllm" else None)
    cells = grid("recipe.engine=vllm", n=[0, 100], m=[0])
    base, *_ = (s.key for s in cells[0].chain.evaluations)
    instead = {"name": "memory", "instead_of": "vllm 0.32.0", "reason": "the engine failed again"}
    made.publish(tmp_path / "one", cells, more=lambda stage: {"engine": asked})
    made.publish(tmp_path / "two", cells, more=lambda stage: {"engine": instead if stage.key == base else asked})
    assert "note: Answers are of vllm 0.32.0 (bfloat16)." in report.finish(tmp_path / "one", "mine")
    text = report.finish(tmp_path / "two", "mine")
    assert (
        "Answers are of different engines: the model in memory (1 records), vllm 0.32.0 (bfloat16) (3 records)." in text
    )
    assert "1 of 4 evaluations were done in memory instead of vllm 0.32.0: the engine failed again." in text


@pytest.mark.usefixtures("undrawn")
def test_an_engine_is_an_axis_like_any_other_that_is_in_a_key(tmp_path: Path, monkeypatch) -> None:
    asked = {"name": "vllm", "version": "0.32.0", "dtype": "float32"}
    monkeypatch.setattr(installed, "identity", lambda config: asked if config.recipe.engine == "vllm" else None)
    both = [c for engine in ("memory", "vllm") for c in grid(f"recipe.engine={engine}", n=[0, 100], m=[0])]
    made.publish(tmp_path, both, more=lambda stage: {"engine": stage.spec.engine} if stage.spec.engine else {})
    text = report.finish(tmp_path, "mine")
    assert "SFT LoRA engine=memory" in text
    assert "SFT LoRA engine=vllm" in text


@pytest.mark.usefixtures("undrawn")
def test_records_made_differently_are_pointed_out(tmp_path: Path) -> None:
    cells = grid(n=[0, 100], m=[0])
    other = made.PROVENANCE | {"packages": {"torch": "2.14.0", "trl": "1.16.0"}, "git": {"commit": "f", "dirty": True}}
    other["hardware"] = {"machine": "x86_64", "cpu": "EPYC 9654", "gpu": "NVIDIA H100"}
    made.publish(tmp_path, cells, provenance=lambda stage: other if stage.kind == "adapt" else made.PROVENANCE)
    text = report.finish(tmp_path, "mine")
    assert "different versions of torch: 2.13.0 (4 records), 2.14.0 (1 records)" in text
    assert "on different hardware: EPYC 7551 AVX2 (4 records), NVIDIA H100 (1 records)." in text
    assert "1 of 5 records were made with uncommitted changes" in text
    assert "trl" not in text.split("note:", 1)[1]
    for file in ("index.html", "mine/table.md", "mine/table.tex"):
        assert "different versions of torch" in (tmp_path / "report" / file).read_text()


def test_machines_whose_clocks_disagree_share_a_folder(tmp_path: Path) -> None:
    cells = grid(n=[0, 100], m=[0])
    made.publish(tmp_path, cells[:1])
    late = made.PROVENANCE | {"started": "2051-01-01T00:00:00+00:00"}
    made.publish(tmp_path, cells, provenance=lambda stage: late)
    text = report.finish(tmp_path, "mine", draw=False)
    assert "note:" not in text
    for index, file in enumerate(sorted(tmp_path.rglob("*"))):
        os.utime(file, (0, 0) if index % 2 else (2**32, 2**32))
    assert report.finish(tmp_path, "mine", draw=False) == text
    assert "0 to do" in summary.plan_text(cells, Store(tmp_path))


def test_other_data_under_one_name_are_pointed_out_and_not_compared(tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    cells = []
    for m in (0, 4000):
        data.write_text(json.dumps({"question": str(m), "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}))
        overrides = [f"task.benchmark.lab_facts.data.path={data}"]
        cells += grid(*overrides, n=[100], m=[m])
    made.publish(tmp_path, cells)
    text = report.finish(tmp_path, "mine", draw=False)
    assert "Records of evaluate on lab_facts read different data under that name (2 fingerprints)" in text
    pairs = compare.comparisons(points(tmp_path))
    assert {p.benchmark for p in pairs} == {"lab_math"}


def test_contamination_is_shown_where_it_was_checked(tmp_path: Path) -> None:
    cells = grid(n=[100], m=[0])
    made.publish(tmp_path, cells, missing=lambda stage: stage.kind == "contamination")
    assert "training set" not in report.finish(tmp_path, "mine", draw=False), "not done yet"
    made.publish(tmp_path, cells)
    assert "lab-math / lab_math: exact 0.00 % of 40 items" in report.finish(tmp_path, "mine", draw=False)
    cells_planned = report.manifest.read_manifest(tmp_path, "mine").cells
    shares = evidence.contamination(cells_planned, Records(tmp_path))["lab-math / lab_math"]
    assert {name: share.as_read() for name, share in shares.items()} == {"exact": {"value": 0.0, "items": 40}}


def test_a_record_that_lacks_what_it_needs_is_named_in_one_line(tmp_path: Path) -> None:
    (cell,) = grid(n=[0], m=[0])
    made.publish(tmp_path, [cell])
    folder = tmp_path / "store" / "evaluate" / cell.chain.evaluations[0].key
    content = records.read(folder).as_read() | {"seconds": "long"}
    del content["digest"]
    (folder / "record.json").write_text(json.dumps(content | {"digest": records.record_digest(content)}))
    with pytest.raises(
        UserError, match=r"record.json: not a record \(seconds\.\w+: .*\); move its folder away"
    ) as error:
        records.read(folder)
    assert "\n" not in str(error.value)


def test_damaged_items_are_named(tmp_path: Path) -> None:
    cells = grid(n=[0], m=[0])
    made.publish(tmp_path, cells)
    file = tmp_path / "store" / "evaluate" / cells[0].chain.evaluations[0].key / "items.jsonl"
    whole = file.read_text()
    for damage in (whole[:-20], "\n".join(whole.splitlines()[:-1]), ""):
        file.write_text(damage)
        text = report.finish(tmp_path, "mine", draw=False)
        assert "no table: " in text
        assert str(file) in text


@pytest.mark.usefixtures("undrawn")
def test_one_damaged_sweep_does_not_take_the_others_along(tmp_path: Path) -> None:
    cells, other = grid(n=[0, 100], m=[0]), grid("sweep=other", n=[200], m=[0])
    made.publish(tmp_path, cells)
    made.publish(tmp_path, other)
    record = tmp_path / "store" / "adapt" / other[0].chain.adapt.key / "record.json"
    for file in (record, tmp_path / "manifests" / "other.json"):
        file.write_text("{")
        text = report.finish(tmp_path, "mine", draw=False)
        assert re.search(r"SFT LoRA +\d", text)
        (line,) = (line for line in text.splitlines() if str(file) in line)
        assert line.startswith("sweep other is not in results.csv: ")
        assert {r["sweep"] for r in read_csv(tmp_path / "report" / "results.csv")} == {"mine"}
        assert f"no table: {file}" in report.everything(tmp_path, [])
        assert str(file) in (tmp_path / "report" / "index.html").read_text()
    with pytest.raises(UserError, match="sweep=never: no such sweep"):
        report.everything(tmp_path, ["never"])


def test_seeds_that_were_tested_on_different_items_are_named(tmp_path: Path) -> None:
    file, cells = tmp_path / "facts.jsonl", []
    for seed in (0, 1):
        question = {"question": str(seed), "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
        file.write_text(json.dumps(question))
        cells += grid(f"task.benchmark.lab_facts.data.path={file}", n=[100], m=[0], seed=[seed])
        made.publish(tmp_path, cells, items=40 + seed)
    assert "no table: seeds of one cell were tested on different items of lab_facts" in report.finish(
        tmp_path, "mine", draw=False
    )


def test_initializations_are_rows_of_their_own(tmp_path: Path) -> None:
    cells = grid(n=[0, 100], m=[0, 40]) + grid("init=gaussian", n=[0, 100], m=[0, 40])
    cells = list({c.id: c for c in cells}.values())
    made.publish(tmp_path, cells)
    found = points(tmp_path)
    text = formats.text(tables.build(found)[0])
    assert not re.search(r"SFT LoRA gaussian\s+-", text), "the base is one cell for all initializations"
    assert len(set(compare.comparisons(found).values())) == 8, "each D2LoRA is compared with LoRA of its initialization"


@pytest.mark.usefixtures("undrawn")
def test_the_quantized_base_is_compared_with_its_own_alone(tmp_path: Path) -> None:
    """LoftQ's (0, 0) is far worse than the base here; D2LoRA(m, 0) of each initialization is as its own base is."""
    cells = [c for i in ("lora", "loftq", "gaussian") for c in grid(f"init={i}", n=[0, 100], m=[0, 40])]
    quantized = lambda c: c.config.init.name == "loftq" and c.config.n == 0  # noqa: E731
    made.publish(tmp_path, list({c.id: c for c in cells}.values()), ability=lambda c: 0.2 if quantized(c) else 0.7)
    found = [p for p in points(tmp_path) if p.benchmark == "lab_math"]
    pairs = compare.comparisons(found)
    bases = {p.init: "loftq" if c.lora.init == "loftq" else "base" for p, c in pairs.items() if p.n == 0}
    assert bases == {"lora": "base", "loftq": "loftq", "gaussian": "base"}
    shown = {line.label: line.points.get(0) for line in tables.build(found)[0].lines}
    assert shown["SFT LoRA gaussian"] is shown["SFT LoRA lora"] is not shown["SFT LoRA loftq"]
    report.write(tmp_path, ["mine"])
    body = read_csv(tmp_path / "report" / "mine" / "inits.csv")
    untrained = {r["initialization"]: r for r in body if (r["m"], r["n"]) == ("0", "0")}
    assert untrained.keys() == {"lora", "loftq"}
    assert float(untrained["loftq"]["- lora"].rstrip("*")) < -20
    without = [p for p in found if (p.init, p.m, p.n) != ("loftq", 0, 0)]
    left = {p.init for p in compare.comparisons(without) if p.n == 0}
    assert left == {"lora", "gaussian"}, "no other model takes the place of LoftQ's base"
    assert 0 not in next(x for x in tables.build(without)[0].lines if x.label == "SFT LoRA loftq").points


def test_an_initialization_from_general_rows_is_compared_within_its_warm_up(tmp_path: Path) -> None:
    data = {"one": "chosen", "two": "rejected"}
    general = [
        cell
        for init in ("lora", "corda_kpm")
        for name, messages in data.items()
        for cell in grid(f"init={init}", f"warmup.name={name}", f"warmup.messages={messages}", n=[100], m=[0, 40])
    ]
    made.publish(tmp_path, list({c.id: c for c in general}.values()))
    found = [p for p in points(tmp_path) if p.benchmark == "lab_math"]
    pairs = {(p.init, p.warmup): c.lora.warmup for p, c in compare.comparisons(found).items()}
    assert pairs == {("lora", n): "" for n in data} | {("corda_kpm", n): n for n in data}


@pytest.mark.usefixtures("undrawn")
def test_sweeps_over_models_and_recipes_keep_their_rows_and_comparisons_apart(tmp_path: Path) -> None:
    cells = [
        c
        for init in ("lora", "gaussian")
        for recipe in ("lab", "laptop")
        for model in ("model.name=one", "model.name=two,model.dtype=bfloat16")
        for c in grid(f"init={init}", f"recipe={recipe}", *model.split(","), n=[8], m=[0, 8])
    ]
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    body = read_csv(tmp_path / "report" / "mine" / "inits.csv")
    rows_ = [
        (r["initialization"], r["model"], r["recipe"], r["m"]) for r in body if r["benchmark"] == "lab_math accuracy"
    ]
    assert len(rows_) == len(set(rows_)) == 16
    table = next(t for t in tables.build(points(tmp_path)) if t.title.startswith("lab_math"))
    labels = [row[0] for row in formats.pair_rows(table)]
    assert len(labels) == len(set(labels)) == 8
    assert "SFT m=8 n=8 two gaussian laptop" in labels


@pytest.mark.thorough
def test_the_same_records_give_the_same_report(tmp_path: Path) -> None:
    made.publish(tmp_path, [c for i in ("lora", "gaussian") for c in grid(f"init={i}", n=[8, 16], m=[0, 8])], items=8)
    report.write(tmp_path, ["mine"])
    files = {f: f.read_bytes() for f in (tmp_path / "report").rglob("*.*")}
    assert {"curves.png", "curves.pdf", "curves.svg", "inits.md", "table.tex", "index.html"} <= {f.name for f in files}
    report.write(tmp_path, ["mine"])
    assert [f for f, content in files.items() if f.read_bytes() != content] == []


@pytest.mark.usefixtures("undrawn")
def test_each_arm_s_costs_are_means_over_seeds_and_a_shared_warm_up_stands_at_each(tmp_path: Path) -> None:
    cells = grid(methods=("sft", "simpo"), n=[0, 100, 200], m=[0, 40], seed=[0, 1])
    made.publish(tmp_path, cells, missing=lambda stage: stage.label.startswith("simpo") and ", 200)" in stage.label)
    report.write(tmp_path, ["mine"])
    rows = read_csv(tmp_path / "report" / "mine" / "costs.csv")
    arms = [(r["method"], r["m"], r["n"]) for r in rows]
    assert arms == [("SFT", m, n) for m in ("0", "40") for n in ("100", "200")] + [
        ("SimPO", "0", "100"),
        ("SimPO", "40", "100"),
    ]
    assert {r["seeds"] for r in rows} == {"2"}
    assert {(r["m"], r["warm-up (s)"]) for r in rows} == {("0", "-"), ("40", "1.0")}
    assert [(r["samples"], r["tokens"], r["tokens/s"]) for r in rows[:2]] == [
        ("100", "900", "900"),
        ("200", "1800", "1800"),
    ]
    assert {(r["adaptation (s)"], r["peak memory (MB)"]) for r in rows} == {("1.0", "100")}
    assert "What each arm cost to train" in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.thorough
def test_initializations_stand_side_by_side_with_what_they_cost(tmp_path: Path) -> None:
    grid_ = [c for i in ("lora", "milora", "eva") for c in grid(f"init={i}", n=[8, 16], m=[0, 8], seed=range(4))]
    better = lambda cell: made.gain(cell) + (0.4 if cell.config.init.name == "milora" else 0)  # noqa: E731
    lost = next(c.chain.evaluations[0].key for c in grid_ if c.config.init.name == "eva")
    made.publish(tmp_path, grid_, items=200, ability=better, missing=lambda stage: stage.key == lost)
    report.write(tmp_path, ["mine"])
    folder = tmp_path / "report" / "mine"
    with (folder / "inits.csv").open() as lines:
        head, *body = csv.reader(lines)
    assert head[:7] == ["initialization", "method", "m", "n", "benchmark", "value", "95 % interval"]
    body = [row for row in body if row[4] == "lab_math accuracy"]
    assert [row[0] for row in body] == ["lora", "milora", "eva"] * 4
    assert {row[0]: row[-2] for row in body} == {"lora": "-", "milora": "1.0", "eva": "1.0"}, "seconds of preparation"
    difference = head.index("- lora")
    assert all(float(row[difference].rstrip("*")) > 15 and "*" in row[difference] for row in body if row[0] == "milora")
    assert all("*" not in row[difference] for row in body if row[0] != "milora")
    assert (folder / "inits.png").stat().st_size > 1000
    assert "4 training seeds (0, 1, 2, 3)" in (folder / "inits.md").read_text()
    said = "lab_math accuracy: of 8 comparisons with init=lora at the same m and n an initialization is better beyond chance in 4 (milora 4), worse beyond chance in 0"
    assert said in (folder / "inits.md").read_text()
    assert said in report.finish(tmp_path, "mine", draw=False)
    assert said in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.thorough
def test_a_sweep_of_one_initialization_has_no_table_of_them(table3: Path) -> None:
    assert not (table3 / "report" / "mine" / "inits.md").exists()


def test_what_a_recipe_sets_is_shown_with_it_and_what_is_about_the_machine_is_no_axis(tmp_path: Path) -> None:
    recipes = [grid(f"recipe={r}", methods=("dpo",), n=[8], m=[0, 8]) for r in ("lab", "laptop")]
    assert len({c.config.method.epochs for cells in recipes for c in cells}) == 2
    made.publish(tmp_path, recipes[0] + recipes[1])
    assert {p.recipe for p in points(tmp_path)} == {"lab", "laptop"}
    made.publish(tmp_path, recipes[0] + grid("recipe=laptop", "method.beta=0.2", methods=("dpo",), n=[8], m=[0, 8]))
    assert {p.axes.get("method.beta") for p in points(tmp_path) if p.n != 0} == {"0.1", "0.2"}
    how = (
        "micro_batch=4 eval_batch=7 attention=flex_attention gradient_checkpointing=true threads=2 checkpoint_minutes=1"
        " compile=layers kernels=true"
    )
    other = [f"recipe.{x}" for x in (*how.split(), "engine_python=/x", "packing=padded")]
    assert {x.split("=")[0] for x in other[:-1]} == set(MACHINE)
    assert [c.id for c in grid(n=[8])] == [c.id for c in grid(*other, n=[8])], "in no stage's key"
    made.publish(tmp_path, grid(n=[8]) + grid(*other, n=[16]))
    assert {p.n for p in points(tmp_path)} == {8, 16}
    dropout = "recipe.lora.dropout=0.1"
    made.publish(tmp_path, grid(dropout, n=[8]) + grid(dropout, *other, n=[16]))
    layout = {"recipe.packing", "recipe.micro_batch", "recipe.attention"}
    assert all(set(p.axes) == layout for p in points(tmp_path)), "they decide which units are dropped"


def test_general_rows_that_only_the_preparation_sees_are_an_axis_too(tmp_path: Path) -> None:
    def named(name: str, *overrides: str) -> list[Cell]:
        return grid("init=eva", "init.data=general", f"warmup.name={name}", *overrides, n=[8])

    made.publish(tmp_path, named("one") + named("two", "warmup.messages=rejected"))
    assert {p.warmup for p in points(tmp_path)} == {"one", "two"}
    made.publish(tmp_path, named("one") + named("one", "warmup.messages=rejected"))
    assert {p.axes["warmup.messages"] for p in points(tmp_path)} == {"chosen", "rejected"}


def test_answers_that_were_cut_or_are_empty_are_said_and_in_results_csv(tmp_path: Path) -> None:
    cells = grid(n=[0, 100], m=[0, 4000])
    made.publish(tmp_path, cells, more=lambda stage: {"counts": {"cut": 33, "empty": 0}, "eval_batch": 8})
    text = report.finish(tmp_path, "mine", draw=False)
    assert re.search(
        r"note: 132 of 160 answers to \S+ \(82.5%, in one evaluation 82%\) stopped at max_new_tokens", text
    )
    assert "are empty" not in text
    found = read_csv(tmp_path / "report" / "results.csv")
    assert {(r["cut"], r["empty"], r["eval_batch"]) for r in found} == {("33", "0", "8")}


def test_an_exact_benchmark_is_shown_and_compared_as_right_or_wrong(tmp_path: Path) -> None:
    cells = grid("task.benchmark.lab_math.kind=exact", n=[0, 100], m=[0, 4000])
    made.publish(tmp_path, cells)
    text = report.finish(tmp_path, "mine")
    assert "lab_math: accuracy in %" in text
    pairs = compare.comparisons(p for p in points(tmp_path) if p.benchmark == "lab_math")
    assert {c.test for c in pairs.values()} == {"exact McNemar"}
    assert "lab_math: accuracy in %" in (tmp_path / "report" / "index.html").read_text()


def test_a_likelihood_has_a_table_in_bits_where_more_is_better(tmp_path: Path) -> None:
    """Scores are negative: their intervals are not those of shares, and D2LoRA is better where its value is higher."""
    cells = grid("+benchmark@task.benchmark=lab_math_likelihood", n=[0, 100], m=[0, 4000])
    made.publish(tmp_path, cells, ability=lambda cell: made.gain(cell) + 0.3 * (cell.config.m != 0))
    text = report.finish(tmp_path, "mine")
    assert "lab_math_likelihood: loglikelihood_per_byte in hundredths of a bit" in text
    notes = " ".join(formats.footnotes(tables.build(points(tmp_path))))
    assert "loglikelihood_per_byte is shown in hundredths of a bit per byte. More is better" in notes
    said = next(t for t in tables.build(points(tmp_path)) if t.points[0].benchmark == "lab_math_likelihood").verdict
    assert "Equivalent within 0.1 hundredths of a bit (two one-sided tests, 5 %) in 0" in said
    assert re.search(r"Pooled over 2 cells: \+\d+\.\d{3} hundredths of a bit \[", said)
    assert re.search(r"differences from \d\.\d\d( to \d\.\d\d)? hundredths of a bit on", said)
    assert "point" not in said
    (panel,) = [p for p in difference_panels(tmp_path) if p.title == "lab_math_likelihood"]
    assert (panel.margin, differences.margin_label(panel)) == (0.1, "within ± 0.1 hundredths of a bit")
    of_likelihood = [p for p in points(tmp_path) if p.benchmark == "lab_math_likelihood"]
    assert all(p.value < 0 and p.interval[0] < p.value < p.interval[1] < 0 for p in of_likelihood)
    pairs = compare.comparisons(of_likelihood)
    assert {c.decision for c in pairs.values()} == {"better"}
    assert {c.test for c in pairs.values()} == {"paired bootstrap"}


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a grid over SFT's learning rate, with its report."""
    output = tmp_path_factory.mktemp("rates")
    cells = [
        cell
        for rate in ("5e-4", "1e-3", "2e-3", "4e-3")
        for replicate in range(3)
        for cell in grid(f"recipe.lr.sft={rate}", f"replicate={replicate}", n=[0, 500], m=[0, 4000])
    ]
    made.publish(output, cells)
    report.write(output, ["mine"])
    return output


def test_a_swept_learning_rate_has_a_table_a_figure_and_a_verdict(rates: Path) -> None:
    table = tables.build(points(rates))[0]
    assert [tables.column_name(table, c) for c in table.columns] == ["lr=0.0005", "lr=0.001", "lr=0.002", "lr=0.004"]
    assert [line.label for line in table.lines] == ["SFT LoRA n=0", "SFT LoRA n=500", "SFT D2LoRA(4k, 0)", "SFT D2LoRA(4k, 500)"]  # fmt: skip
    base, trained = table.lines[0], table.lines[1]
    assert len(set(base.points.values())) == 1, "the base knows no learning rate: it stands in each column"
    assert len(set(trained.points.values())) == 4
    assert len(table.unique_pairs) == 5, "each rate with its own, and D2LoRA(4k, 0) with the base"
    assert all(c.lora.axes == c.d2lora.axes for c in table.unique_pairs)
    text = formats.text(table)
    assert "D2LoRA beats LoRA in" in text
    assert "3 replicates (0, 1, 2), folded into each number. Each is another draw of the rows" in " ".join(text.split())
    panel = figures.panels(table, "method")[0]
    assert (panel.x, [x for x, _ in panel.curves[0].points]) == ("recipe.lr", [0.0005, 0.001, 0.002, 0.004])
    assert (rates / "report" / "mine" / "curves.png").exists()


def test_results_have_a_column_for_each_axis_empty_where_it_does_not_matter(rates: Path) -> None:
    rows = read_csv(rates / "report" / "results.csv")
    assert {r["recipe.lr"] for r in rows if r["n"] == "500"} == {"0.0005", "0.001", "0.002", "0.004"}
    assert {r["recipe.lr"] for r in rows if r["n"] == "0"} == {""}
    table = read_csv(rates / "report" / "mine" / "table.csv")
    assert {r["recipe.lr"] for r in table if r["n"] == "500"} == {"0.0005", "0.001", "0.002", "0.004"}


@pytest.mark.parametrize(
    ("column", "names", "rows"),
    [
        ("n", ["n=8", "n=16"], 4),
        ("recipe.lora.r", ["r=4", "r=8", "r=16"], 4),
        ("m", ["m=0", "m=8"], 6),
    ],
)
def test_report_columns_decides_what_the_columns_are(tmp_path: Path, column: str, names: list[str], rows: int) -> None:
    asked = f"report.columns={column}"
    ranks = ("4", "8", "16") if column != "n" else ("4", "8")
    cells = [c for r in ranks for c in grid(f"recipe.lora.r={r}", asked, n=[8, 16], m=[0, 8])]
    made.publish(tmp_path, cells)
    table = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("table").tables[0]
    assert [tables.column_name(table, c) for c in table.columns] == names
    assert len(table.lines) == rows
    assert len({line.label for line in table.lines}) == rows, "every axis is in the rows or the columns"
    assert len(table.unique_pairs) == 2 * len(ranks)
    assert all((c.lora.n, c.lora.axes) == (c.d2lora.n, c.d2lora.axes) for c in table.unique_pairs)


@pytest.mark.parametrize("column", ["recipe.lora.rank", "sample", "seed", "report.margin"])
def test_columns_of_no_setting_are_refused(column: str) -> None:
    with pytest.raises(UserError, match=f"report.columns={column}: "):
        grid(f"report.columns={column}", n=[8])


def test_each_kind_of_setting_is_an_axis_of_the_cells_that_depend_on_it(tmp_path: Path) -> None:
    beta = [c for b in ("0.1", "0.3") for c in grid(f"method.beta={b}", methods=["dpo", "orpo"], n=[0, 8], m=[0, 8])]
    warm = [
        c for e in ("1", "2") for c in grid(f"warmup.epochs={e}", "method.beta=0.1", methods=["dpo"], n=[8], m=[0, 8])
    ]
    tokens = grid("task.benchmark.lab_math.max_new_tokens=32", "method.beta=0.1", methods=["dpo"], n=[8])
    draws = [c for d in (0, 1) for c in grid(f"data_seed={d}", "method.beta=0.1", methods=["dpo"], n=[8], m=[8])]
    made.publish(tmp_path, [*beta, *warm, *tokens, *draws])
    found = points(tmp_path)
    assert not any("method.beta" in p.axes for p in found if p.n == 0)
    assert not any("warmup.epochs" in p.axes for p in found if p.m == 0)
    assert not any("data_seed" in p.axes for p in found if p.is_base)
    assert {p.axes["data_seed"] for p in found if p.n == 8} == {"0", "1"}
    limits = "task.benchmark.lab_math.max_new_tokens"
    assert {p.axes.get(limits) for p in found if p.benchmark == "lab_math"} == {"32", "64"}
    assert {p.axes.get(limits) for p in found if p.benchmark == "lab_facts"} == {None}
    for table in tables.build(found):
        labels = [line.label for line in table.lines]
        assert len(labels) == len(set(labels))
        assert {p for line in table.lines for p in line.points.values()} == set(table.points), "none is lost"


def test_each_comparison_is_better_worse_equivalent_or_undecided(tmp_path: Path) -> None:
    """D2LoRA gains much at n = 100, nothing at n = 200, where runs differ in the noise of single answers only."""
    gains = {100: 0.2, 200: 0.0, 400: -0.2}
    ability = lambda c: 0.5 + (gains[c.config.n] if c.config.m else 0)  # noqa: E731
    wide = "report.margin=6"
    cells = grid(wide, n=[100, 200, 400], m=[0, 4000], seed=range(5))
    made.publish(tmp_path, cells, items=400, ability=ability)
    report.write(tmp_path, ["mine"])
    table = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("table").tables[0]
    assert {c.d2lora.n: c.decision for c in table.unique_pairs} == {100: "better", 200: "equivalent", 400: "worse"}
    said = "Equivalent within 6 points (two one-sided tests, 5 %) in 1, undecided in 0."
    files = {f.name: f.read_text() for f in (tmp_path / "report" / "mine").iterdir() if f.suffix in (".md", ".tex")}
    assert said in files["table.md"]
    assert "| equivalent |" in files["table.md"]
    assert "& equivalent " in files["table.tex"]
    assert "D2LoRA is" in (tmp_path / "report" / "index.html").read_text()
    rows = read_csv(tmp_path / "report" / "mine" / "table.csv")
    row = next(r for r in rows if r["decision"] == "equivalent" and r["benchmark"] == "lab_math")
    assert -0.06 < float(row["equivalence_low"]) < float(row["difference"]) < float(row["equivalence_high"]) < 0.06
    pair = next(c for c in table.unique_pairs if c.d2lora.n == 200)
    pair.margin = 0.001
    assert pair.decision == "undecided"


def test_one_seed_s_equivalence_is_newcombe_s_interval_within_one_point_where_a_manifest_does_not_say(
    tmp_path: Path,
) -> None:
    made.publish(tmp_path, grid(n=[100], m=[0, 4000]), items=100)
    file = tmp_path / "manifests" / "mine.json"
    content = json.loads(file.read_text())
    for cell in content["cells"]:
        del cell["config"]["report"]
    file.write_text(json.dumps(content))
    table = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("table").tables[0]
    (pair,) = table.unique_pairs
    assert table.margin == 1.0
    assert pair.equivalence[0] > pair.interval[0]
    assert pair.decision == "undecided", "100 items are too few for one point"


@pytest.mark.parametrize(("items", "decision"), [(6, "undecided"), (600, "equivalent")])
def test_equal_answers_to_few_items_are_not_called_equivalent(tmp_path: Path, items: int, decision: str) -> None:
    """Where nothing differs, resampling gives an interval of no width, whatever the number of items."""
    cells = grid("task=lab_title", n=[100], m=[0, 4000])
    made.publish(tmp_path, cells, items=items, ability=lambda cell: -9.0)  # each answer scores 0
    (pair,) = tables.build(points(tmp_path))[0].unique_pairs
    assert pair.decision == decision
    assert pair.interval == pytest.approx((-stats.unseen(items), stats.unseen(items)))


def test_the_pooled_effect_is_of_the_cells_with_the_same_items_and_seeds(tmp_path: Path) -> None:
    cells = grid(methods=("sft", "orpo"), n=[100, 200], m=[0, 4000], seed=range(3))
    lost = next(c for c in cells if c.config.seed == 2 and c.config.m == 4000)
    made.publish(tmp_path, cells, items=300, missing=lambda stage: stage in lost.chain.evaluations)
    table = tables.build(points(tmp_path))[0]
    effect = verdict.pooled(table.unique_pairs)
    assert (effect.cells, effect.left_out) == (3, 1)
    whole = [c for c in table.unique_pairs if len(c.seeds) == 3]
    assert effect.difference == pytest.approx(np.mean([c.difference for c in whole]))
    widths = [high - low for low, high in (c.interval for c in whole)]
    assert effect.interval[1] - effect.interval[0] < min(widths)
    assert re.search(r"Pooled over 3 cells: \S+ points \[\S+, \S+\] \(95 %\), without 1 cell of other", table.verdict)
    assert "Pooled" not in verdict.verdict(whole[:1]), "one cell's effect is in the table"
    alike = [dataclasses.replace(c, differences=np.zeros_like(c.differences[:1])) for c in whole]
    assert "points (all items differ alike: no interval)" in verdict.verdict(alike), (
        "[+0.00, +0.00] would look as if all were known"
    )


def test_cells_that_share_an_arm_are_not_pooled_as_if_they_were_independent(tmp_path: Path) -> None:
    """Two equal D2LoRA arms against one LoRA: pooling them tells no more than one of them."""
    made.publish(tmp_path, grid(n=[100], m=[0, 4000]), items=300)
    (pair,) = tables.build(points(tmp_path))[0].unique_pairs
    twin = compare.compared(pair.lora, pair.d2lora)
    (low, high), alone = verdict.pooled([pair, twin]).interval, pair.interval
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.05)


def worth_lines(output: Path) -> list[str]:
    return tables.build(points(output))[0].remarks


def test_a_warm_up_is_worth_the_task_samples_that_lora_needs_more_for_the_same(tmp_path: Path) -> None:
    """Accuracy rises by 5 points in 100 samples; a warm-up counts as 200 of them, so that at n = 800 it leaves LoRA's curve."""
    ability = lambda c: 0.3 + 0.0005 * (c.config.n + (200 if c.config.m else 0))  # noqa: E731
    made.publish(tmp_path, grid(n=[0, 200, 400, 800], m=[0, 4000], seed=range(3)), items=1500, ability=ability)
    (line,) = worth_lines(tmp_path)
    assert line.startswith("SFT D2LoRA(4k, n): 4k general samples are worth ")
    assert line.count("task samples at n = ") == 1
    assert line.endswith("; not determinable at n = 800.")
    known = re.findall(r"(-?\d+) \[(-?\d+|less), (\d+|more)\](?: task samples)? at n = (\d+)", line)
    assert [n for *_, n in known] == ["0", "200", "400"]
    for value, low, high, _ in known:
        assert 130 < float(value) < 270
        assert low == "less" or float(low) < 200
        assert high == "more" or float(high) > 200


@pytest.mark.parametrize(
    ("sizes", "gain", "said"),
    [
        ([0, 400], 0.1, "LoRA's curve does not say"),  # two points make no curve
        ([0, 200, 400], 2.0, "LoRA's curve does not say"),  # above it
        ([0, 200, 400], -2.0, "LoRA's curve does not say"),  # below it
        ([400], 0.1, None),
    ],
)
def test_what_a_warm_up_is_worth_is_not_said_where_the_curve_does_not(tmp_path: Path, sizes, gain, said) -> None:
    ability = lambda c: 0.3 + 0.0005 * c.config.n + (gain if c.config.m else 0)  # noqa: E731
    made.publish(tmp_path, grid(n=sizes, m=[0, 4000]), items=200, ability=ability)
    lines = worth_lines(tmp_path)
    assert len(lines) == bool(said)
    assert all(said in line for line in lines)


def test_a_flat_curve_does_not_say_what_a_warm_up_is_worth(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[0, 200, 400], m=[0, 4000]), items=100, ability=lambda c: 9.0)
    assert worth_lines(tmp_path) == ["SFT D2LoRA(4k, n): LoRA's curve does not say what the warm-up is worth in task samples."]  # fmt: skip


def test_shares_of_the_variance_where_seeds_and_draws_are_crossed(tmp_path: Path) -> None:
    """Draws of the rows differ by 10 points and more, seeds hardly."""
    luck = {0: -0.15, 1: 0.0, 2: 0.15}
    cells = [c for d in luck for c in grid(f"data_seed={d}", n=[100], m=[0, 4000], seed=range(3))]
    made.publish(tmp_path, cells, items=300, ability=lambda c: 0.5 + luck[c.config.data_seed])
    (line,) = [x for x in worth_lines(tmp_path) if x.startswith("Shares")]
    assert "(300 items, 3 seeds on each of 3 draws, 2 arms)" in line
    shares = {k: int(v) for k, v in re.findall(r"(items|training seed|draw of the rows|rest) (\d+) %", line)}
    assert 99 <= sum(shares.values()) <= 101
    assert shares["draw of the rows"] > 90
    assert shares["training seed"] < 3


def test_shares_of_the_variance_of_replicates(tmp_path: Path) -> None:
    cells = [c for r in range(3) for c in grid(f"replicate={r}", n=[100], m=[0, 4000])]
    made.publish(tmp_path, cells, items=300)
    text = report.finish(tmp_path, "mine", draw=False)
    assert re.search(r"\(300 items, 3 replicates,\s2\sarms\):\s+items \d+ %,\s+replicate\s+\d+ %", text)
    made.publish(tmp_path, grid("sweep=other", n=[100], m=[0, 4000], seed=range(3)), items=300)
    assert "Shares" not in report.finish(tmp_path, "other", draw=False)


@pytest.mark.usefixtures("undrawn")
def test_the_artefact_of_the_documentation_is_written_and_on_the_page(tmp_path: Path, monkeypatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (code,) = re.findall(r"<!-- artefact: \S+ -->\n```python\n(.*?)```", text, re.S)
    defined: dict = {}
    exec(code, defined)
    monkeypatch.setattr(artefacts, "ARTEFACTS", (*artefacts.ARTEFACTS, defined["ARTEFACT"]))
    cells = grid(n=[100, 200], m=[0])
    for stage in (cell.chain.adapt for cell in cells):
        facts = {"metrics": {"samples_seen": 9}, "data": {"samples": 9, "misfits": 3}}
        Store(tmp_path).ensure(stage, lambda folder, s=stage, f=facts: made.record(s, **f))
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    rows = read_csv(tmp_path / "report" / "mine" / "too_long.csv")
    assert [row["rows too long"] for row in rows] == ["3", "3"]
    assert "Rows that were too long, by training" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a grid with all control arms: merged is as good as D2LoRA, and the others are as LoRA."""
    output = tmp_path_factory.mktemp("controlled")
    cells = [
        cell
        for control in ("none", "longer", "mixed", "merged", "placebo")
        for replicate in range(3)
        for cell in grid(f"control={control}", f"replicate={replicate}", n=[0, 100, 500], m=[0, 4000])
    ]

    def ability(cell: Cell) -> float:
        return 0.6 if cell.config.m != 0 and cell.config.control.name in ("none", "merged") else 0.4

    made.publish(output, cells, items=200, ability=ability)
    report.write(output, ["mine"])
    return output


def test_control_arms_are_rows_of_their_own_and_d2lora_is_still_compared_with_lora(controlled: Path) -> None:
    table = tables.build(points(controlled))[0]
    arms = ["LoRA", "D2LoRA(4k, n)", "longer(4k, n)", "mixed(4k, n)", "merged(4k, n)", "placebo(4k, n)"]
    assert [line.label for line in table.lines] == [f"SFT {arm}" for arm in arms]
    assert [sorted(line.points) for line in table.lines] == [[0, 100, 500]] * 2 + [[100, 500]] * 3 + [[0, 100, 500]]
    assert {(c.lora.arm, c.d2lora.arm) for c in table.unique_pairs} == {("LoRA", "D2LoRA(4k, n)")}


def test_d2lora_is_compared_with_its_best_control(controlled: Path) -> None:
    chosen = [p for p in points(controlled) if p.benchmark == "lab_math"]
    found = controls.against(chosen)
    assert [(each.point.n, sorted(each.comparisons)) for each in found] == [
        (0, ["placebo"]),
        (100, ["longer", "merged", "mixed", "placebo"]),
        (500, ["longer", "merged", "mixed", "placebo"]),
    ]
    for each in found:
        for name, comparison in each.comparisons.items():
            assert comparison.beyond_chance == (name != "merged"), name
        assert each.best.lora.control == ("merged" if each.point.n else "placebo")
    told = controls.verdict(found)
    assert "its best control (longer, mixed, merged, placebo)" in told
    assert "beyond chance in 1 (Holm over 9 comparisons" in told
    assert controls.verdict([]) == ""
    rows = read_csv(controlled / "report" / "mine" / "controls.csv")
    assert {r["rules out"] for r in rows} == {"more steps", "two phases", "it must be continued", "any tokens do"}
    assert "D2LoRA beats its best control" in report.finish(controlled, "mine", draw=False)


def test_a_setting_of_a_control_is_an_axis_of_its_arm_alone(tmp_path: Path) -> None:
    cells = [c for w in ("0.5", "1.0") for c in grid("control=merged", f"control.weight={w}", n=[8], m=[0, 8])]
    made.publish(tmp_path, [*cells, *grid(n=[8], m=[8])])
    weights = {(p.control, p.m): {q.axes.get("control.weight") for q in points(tmp_path) if (q.control, q.m) == (p.control, p.m)} for p in points(tmp_path)}  # fmt: skip
    assert weights == {("none", 0): {None}, ("none", 8): {None}, ("merged", 8): {"0.5", "1.0"}}


def difference_panels(output: Path) -> list[differences.Panel]:
    return sweep_report.load(output, "mine", Records(output)).content("differences").differences


def test_differences_are_the_first_picture_with_their_intervals_and_the_margin(table3: Path) -> None:
    folder = table3 / "report" / "mine"
    assert {f.suffix for f in folder.glob("differences.*")} == {".png", ".svg", ".pdf"}
    assert artefacts.ARTEFACTS[0].name == "differences"
    (panel,) = [p for p in difference_panels(table3) if p.title == "gsm8k"]
    assert [c.label for c in panel.curves] == ["SFT", "DPO", "ORPO"]
    assert (panel.x, panel.xs, panel.margin) == ("n", SIZES, 1.0)
    assert all(c.d2lora.m == 40000 and c.lora.m == 0 for curve in panel.curves for *_, c in curve.points)
    text = (table3 / "report" / "index.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', text)[1])
    first = data["sweeps"][0]["shown"][0]["panels"][0]
    assert (first["margin"], first["band"]) == (0.01, "within ± 1 point")
    x, point, comparison = first["curves"][0]["points"][1]
    assert (x, data["points"][point]["n"], data["comparisons"][comparison]["decision"]) == (1000, 1000, "undecided")


def test_drawn_differences_are_those_of_the_comparisons(table3: Path) -> None:
    from matplotlib import pyplot

    panel = difference_panels(table3)[0]
    figure = figures.stacked([panel], differences.draw_panel, pyplot)
    (axis,) = figure.axes
    drawn = {bar.get_label(): bar for bar in axis.containers}
    for curve in panel.curves:
        line, _, (spans,) = drawn[curve.label].lines
        assert list(line.get_ydata()) == pytest.approx([100 * c.difference for *_, c in curve.points])
        ends = [tuple(segment[:, 1]) for segment in spans.get_segments()]
        assert ends == [pytest.approx([100 * end for end in c.interval]) for *_, c in curve.points]
    low, high = axis.get_ylim()
    assert low < min(100 * c.interval[0] for curve in panel.curves for *_, c in curve.points)
    assert high > max(100 * c.interval[1] for curve in panel.curves for *_, c in curve.points)
    pyplot.close(figure)


def test_each_arm_has_a_panel_of_differences_and_a_swept_rate_is_its_axis(tmp_path: Path, rates: Path) -> None:
    made.publish(tmp_path, grid(methods=("sft", "orpo"), n=[8, 16], m=[0, 8, 40]))
    titles = [p.title for p in difference_panels(tmp_path) if p.title.startswith("lab_math")]
    assert titles == ["lab_math, D2LoRA(8, n)", "lab_math, D2LoRA(40, n)"]
    panels = [p for p in difference_panels(rates) if p.title.startswith("lab_math")]
    assert {p.x for p in panels} == {"recipe.lr"}
    assert [p.title for p in panels] == ["lab_math, n=0", "lab_math, n=500"]
    made.publish(tmp_path, grid("sweep=alone", n=[8, 16], m=[0]))
    assert sweep_report.load(tmp_path, "alone", Records(tmp_path)).content("differences") is None


def test_items_that_belong_together_are_drawn_together(tmp_path: Path) -> None:
    """Ten questions on each of 20 passages: intervals are wider, tests are not exact, and the report says why."""
    made.publish(tmp_path / "items", grid(n=[100, 200], m=[0, 4000], seed=range(3)), items=200)
    column = "+task.benchmark.lab_math.cluster=passage"
    cells = grid(column, n=[100, 200], m=[0, 4000], seed=range(3))
    made.publish(tmp_path / "clusters", cells, items=200)
    for cell in cells:
        file = tmp_path / "clusters" / "store" / "evaluate" / cell.chain.evaluations[0].key / "items.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        whole = [line | {"cluster": f"passage {line['index'] % 20}"} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in whole))
    text = report.finish(tmp_path / "clusters", "mine")
    table, plain = (tables.build(points(tmp_path / name))[0] for name in ("clusters", "items"))
    assert {c.test for c in table.unique_pairs} == {"two-level bootstrap of clusters"}
    assert all(c.units.shape == (3, 20) for c in table.unique_pairs)
    assert [p.value for p in table.points] == pytest.approx([float(p.table.mean()) for p in table.points])
    assert "Pooled over 2 cells" in table.verdict
    note = "lab_math: its 200 items are in 20 clusters, which intervals and tests draw instead of items."
    assert note in formats.footnotes([table])
    assert note not in formats.footnotes([plain])
    assert note in (tmp_path / "clusters" / "report" / "mine" / "table.md").read_text()
    assert "lab_facts" in text


def test_problems_of_one_template_are_drawn_together_and_no_key_knows(tmp_path: Path) -> None:
    """Forty questions of eight templates, with other numbers and names: the report reads them from the records that there are."""
    people = ("Ann", "Ben", "Kim", "Vic", "Leo")
    words = lambda i: f"{people[i // 8]} has {i} of {'abcdefgh'[i % 8]}"  # noqa: E731
    shape = {"n": [100, 200], "m": [0, 4000], "seed": range(3)}
    made.publish(tmp_path, earlier := grid("sweep=before", **shape), text=words)
    cells = grid("+benchmark@task.benchmark=lab_math_by_template", **shape)
    assert {s.key for c in cells for s in c.chain.stages} == {s.key for c in earlier for s in c.chain.stages}
    made.publish(tmp_path, cells)
    found = {
        name: [p for p in points(tmp_path) if p.benchmark == name] for name in ("lab_math", "lab_math_by_template")
    }
    plain, clustered = found.values()
    assert {p.clusters is None for p in plain} == {True}
    assert {p.clusters.max() + 1 for p in clustered} == {8}
    assert [p.value for p in plain] == [p.value for p in clustered]
    assert {c.test for c in compare.comparisons(clustered).values()} == {"two-level bootstrap of clusters"}
    report.write(tmp_path, ["mine"])
    note = "lab_math_by_template: its 40 items are in 8 clusters"
    assert note in (tmp_path / "report" / "mine" / "table.md").read_text()
    rows = read_csv(tmp_path / "report" / "results.csv")
    (one,) = [r for r in rows if r["benchmark"] == "lab_math_by_template" and r["cell_id"] == cells[0].id]
    low, high = stats.interval(clustered[0].table[:1], clusters=clustered[0].clusters)
    assert (float(one["low"]), float(one["high"])) == pytest.approx((low, high))
    assert not any("varies" in column for column in rows[0])


def test_the_lab_s_templates_leave_open_what_its_problems_are_drawn_with(cell) -> None:
    given = "benchmark@task.benchmark=[lab_math_by_template]"
    pattern = cell(given).config.benchmarks["lab_math_by_template"].varies
    for word in ("17", *world.NAMES, *world.THINGS):
        assert re.fullmatch(pattern, word), word
    with pytest.raises(UserError, match=r"varies=\(: not a regular expression"):
        cell(given, "task.benchmark.lab_math_by_template.varies='('")


def test_a_cluster_column_is_in_the_key_only_where_it_is_named() -> None:
    (plain,), (named,) = grid(n=[0]), grid("+task.benchmark.lab_math.cluster=question", n=[0])
    assert "cluster" not in plain.chain.evaluations[0].spec.content()["benchmark"]
    assert named.chain.evaluations[0].spec.content()["benchmark"]["cluster"] == "question"
    assert plain.chain.evaluations[1].key == named.chain.evaluations[1].key


def halves_of(output: Path) -> content.Content:
    return sweep_report.load(output, "mine", Records(output)).content("halves")


def test_halves_of_an_arm_s_replicates_are_compared_and_nothing_is_found_that_is_not_there(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(methods=["sft", "dpo"], n=[0, 100], m=[0, 4000], seed=range(7)), items=60)
    shown = halves_of(tmp_path)
    math = [row for row in shown.rows.rows if row[2].startswith("lab_math")]
    assert [row[0] for row in math] == [
        "SFT D2LoRA(4k, 0)",
        "SFT LoRA n=100",
        "SFT D2LoRA(4k, 100)",
        "DPO LoRA n=100",
        "DPO D2LoRA(4k, 100)",
    ], "the base has one evaluation, a warm-up's at n=0 is the same under both methods"
    assert {row[1] for row in math} == {"1, 3, 5 - 0, 2, 4"}, "the seventh has no partner"
    assert shown.sentences == [
        f"{b}: A/A: of 5 arms halves differ beyond chance in 0 (Holm, alpha 5 %)."
        for b in ("lab_math accuracy", "lab_facts acc")
    ]
    assert shown.sentences[0] in report.write(tmp_path, ["mine"])
    assert len(read_csv(tmp_path / "report" / "mine" / "halves.csv")) == 10


def test_halves_that_do_differ_are_found(tmp_path: Path) -> None:
    """As where half of the replicates were trained by other code."""
    cells = grid("m=0", n=[100, 500], seed=range(6))
    made.publish(tmp_path, cells, items=200, ability=lambda cell: 0.4 + 0.25 * (cell.config.seed % 2))
    shown = halves_of(tmp_path)
    assert "halves differ beyond chance in 2" in shown.sentences[0]
    assert all(row[3].startswith("+") and row[3].endswith("*") for row in shown.rows.rows[:2])


def test_fewer_than_four_replicates_have_no_halves(tmp_path: Path) -> None:
    made.publish(tmp_path, grid("m=0", n=[100], seed=range(3)))
    assert halves_of(tmp_path) is None


@pytest.mark.parametrize("asked", [["lab_math", "lab_facts", "lab_recall"], ["lab_math", "lab_facts"]])
def test_figure_3_of_the_lab_shows_what_is_forgotten_where_a_grid_has_it(asked: list[str], tmp_path: Path) -> None:
    choice = f"benchmark@task.benchmark=[{','.join(asked)}]"
    made.publish(tmp_path, grid(choice, methods=METHODS, n=[0, 100, 200], m=[0, 4000]))
    loaded = sweep_report.load(tmp_path, "mine", Records(tmp_path))
    figure = next(a for a in paper.FIGURES if a.name == "figure3")
    assert {p.benchmark for p in paper.select(figure, loaded.sweep.points)} == {asked[-1]}
    assert loaded.content("figure3").panels


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("recipe.lr_warmup_ratio", ("0.0", "0.1")),
        ("recipe.lr.warmup", ("0.001", "0.002")),
        ("recipe.schedule", ("cosine", "linear")),
        ("recipe.weight_decay", ("0.0", "0.1")),
        ("recipe.max_grad_norm", ("1.0", "0.5")),
        ("recipe.batch", ("8", "16")),
        ("recipe.lora.alpha", ("16", "32")),
        ("method.epochs", ("1", "2")),
        ("split_seed", ("0", "1")),
        ("task.continuation", ("rest", "step")),
    ],
)
def test_whatever_makes_two_results_of_a_cell_is_an_axis(tmp_path: Path, key: str, values: tuple[str, str]) -> None:
    cells = [c for value in values for c in grid(f"{key}={value}", "+task.data.hold_out=10", n=[8], m=[8])]
    assert len({c.id for c in cells}) == 2
    made.publish(tmp_path, cells)
    assert [p.axes[key] for p in points(tmp_path) if p.benchmark == "lab_math"] == list(values)


def test_two_results_that_nothing_tells_apart_are_never_folded(tmp_path: Path) -> None:
    made.publish(tmp_path, [*grid(n=[8]), *grid("recipe.batch=16", n=[8])])
    file = tmp_path / "manifests" / "mine.json"
    content = json.loads(file.read_text())
    for cell in content["cells"]:
        cell["config"]["recipe"]["batch"] = 8  # as if the report did not know the setting
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a table would hide what tells lab-math-sft-"):
        points(tmp_path)


def test_a_file_of_the_report_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "report" / "table.md"
    write_text(file, "before\r\n")
    assert file.read_bytes() == b"before\r\n"

    def fail() -> None:
        with whole_file(file) as part:
            part.write_text("half of")
            assert file.read_bytes() == b"before\r\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_bytes() == b"before\r\n"
    assert [f.name for f in file.parent.iterdir()] == ["table.md"]


def test_many_arms_are_rows_of_one_figure_of_differences(tmp_path: Path) -> None:
    """Seven initializations: a panel each, with scales of their own, could not be compared by eye."""
    inits = ("lora", "gaussian", "orthogonal", "pissa", "olora", "milora", "rslora")
    made.publish(tmp_path, [c for i in inits for c in grid(f"init={i}", methods=("sft", "dpo"), n=[8, 16], m=[0, 8])])
    report.write(tmp_path, ["mine"])
    shown = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("differences")
    assert shown.differences == []
    table = next(t for t in tables.build(points(tmp_path)) if t.points[0].benchmark == "lab_math")
    panels = differences.forest_panels(table)
    assert [panel.title for panel in panels] == ["lab_math, n=8", "lab_math, n=16"]
    for panel in panels:
        assert sorted({entry.row for entry in panel.entries}) == sorted(inits)
        assert {entry.label for entry in panel.entries} == {"SFT", "DPO"}
        assert len({entry.comparison for entry in panel.entries}) == 14
    page_ = (tmp_path / "report" / "index.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', page_)[1])
    images = {x["title"]: x["image"] for x in data["sweeps"][0]["shown"] if x["image"]}
    assert list(images) == [artefacts.ARTEFACTS[0].caption, inits_table.CAPTION], "the page has both figures in it"
    assert all(image.startswith("data:image/svg+xml;base64,") for image in images.values())


def test_a_drawn_forest_has_each_difference_in_its_row(tmp_path: Path) -> None:
    from matplotlib import pyplot

    made.publish(tmp_path, [c for i in ("lora", "pissa", "eva") for c in grid(f"init={i}", n=[100], m=[0, 8])])
    shown = sweep_report.load(tmp_path, "mine", Records(tmp_path)).content("inits")
    figure = shown.draw(pyplot)
    axis = next(a for a in figure.axes if a.get_title().startswith("lab_math"))
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["pissa", "eva"]
    rows_ = {(r[0], r[2]): r for r in shown.rows.rows if r[4] == "lab_math accuracy"}
    column = shown.rows.head.index("- lora")
    for bars, m in zip(axis.containers, ("0", "8"), strict=True):
        line = bars.lines[0]
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert x == pytest.approx(float(rows_[names[round(y)], m][column].rstrip("*")), abs=0.006)
    pyplot.close(figure)
