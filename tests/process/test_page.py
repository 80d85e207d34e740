"""The report's page: self-contained, safe with any text, and working in a browser."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import made
import numpy as np
import pytest
from made import grid

from d2lora import report
from d2lora.records import Records
from d2lora.report import figures, page, tables
from d2lora.report.points import points_of
from d2lora.report.tables import Table

HOSTILE = "</script><img src=x onerror=\"document.body.dataset.harmed='yes'\">\u2028{{x}} & <b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """No figure files are drawn, which takes longest: the page draws its own curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda stem, make: [])
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sweeps with hostile texts, one of them with a missing cell and two seeds."""
    folder = tmp_path_factory.mktemp("page")
    cells = grid(methods=("sft", "dpo"), n=[0, 100, 200], m=[0, 4000])
    made.publish(folder, cells, text=lambda i: f"{HOSTILE} {i}")
    other = grid("sweep=other", n=[100, 200], m=[0, 4000], seed=[0, 1])
    lost = next(c for c in other if c.config.n == 200 and c.config.m == 0 and c.config.seed == 1)
    made.publish(folder, other, missing=lambda stage: stage in lost.chain.stages)
    report.everything(folder, [])
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over initializations, models and m."""
    folder = tmp_path_factory.mktemp("many")
    overrides = ("init=lora", "init=pissa", "model=llama-3.2-1b")
    cells = [c for x in overrides for c in grid(x, methods=("sft", "dpo"), n=[8, 1000], m=[0, 8, 40])]
    made.publish(folder, cells)
    report.write(folder, ["mine"])
    return folder


CHOOSE = """
    const choose = (name, value) => { const x = document.querySelector(`select[name=${name}]`); x.value = value; x.dispatchEvent(new Event("change")); };
    const cell = (label, place = document) => [...place.querySelectorAll("td.open button")].find((b) => b.ariaLabel.startsWith(label));
"""


def in_page(output: Path, script: str, width: int = 1400) -> dict:
    """Open a copy of the page in headless Chromium, run `script` there, and return what it puts into `result`."""
    text = (output / "report" / "index.html").read_text()
    closing = "<script>const result = {};\ntry {" + CHOOSE + script + "} catch (e) { result.error = String(e); }\n"
    closing += "const out = document.createElement('output'); out.id = 'result';"
    closing += "out.textContent = JSON.stringify(result); document.body.append(out);</script></body>"
    file = output / "report" / "probe.html"
    file.write_text(text.replace("</body>", closing))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={output / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<output id="result">(.*?)</output>', done.stdout, re.S)
    assert found, done.stdout[-2000:]
    result = json.loads(html.unescape(found.group(1)))
    assert "error" not in result, result["error"]
    return result


def test_the_page_is_one_file_that_asks_nobody(output: Path) -> None:
    text = (output / "report" / "index.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(
        r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(|fetch\(|XMLHttp""", text.replace(HOSTILE, "")
    )
    assert "/* page." not in text
    assert "/* data */" not in text


def test_texts_of_records_cannot_leave_their_place(output: Path) -> None:
    text = (output / "report" / "index.html").read_text()
    assert text.count("</script>") == 2
    assert "<img" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))
    answers = [a for found in data["answers"].values() for a, _ in found["items"]]
    assert f"{HOSTILE} 1" in answers or f"{HOSTILE} 2" in answers, "kept as they are"
    assert "innerHTML" not in text


def test_a_sample_holds_chance_and_disagreement() -> None:
    scores = [np.zeros(100), np.zeros(100)]
    scores[1][[17, 42]] = 1
    places = page.sample(scores, 8)
    assert len(places) == len(set(places)) == 8
    assert {17, 42} <= set(places)
    assert page.sample(scores, 8) == places
    assert page.sample([np.ones(3)], 8) == [0, 1, 2]


@pytest.mark.browser
@needs_browser
def test_a_cell_opens_with_both_arms_on_the_same_items_and_no_text_runs(output: Path) -> None:
    found = in_page(
        output,
        """
        const button = [...document.querySelectorAll("td.open button")].find((b) => b.ariaLabel.startsWith("SFT D2LoRA(4k, n), n=100"));
        button.click();
        result.open = dialog.open;
        result.title = dialog.querySelector("h3").textContent;
        const item = dialog.querySelector(".item");
        result.texts = [...item.querySelectorAll("pre")].map((p) => p.textContent);
        result.arms = [...item.querySelectorAll(".answers .small")].map((p) => p.textContent);
        result.details = dialog.querySelector("dl").textContent;
        result.images = document.querySelectorAll("img").length;
        result.harmed = document.body.dataset.harmed || "no";
        """,
    )
    assert found["open"]
    assert found["title"] == "SFT D2LoRA(4k, n), n=100 on lab_math"
    assert len(found["texts"]) == 4, "prompt, gold and two answers"
    assert found["texts"][2].startswith(HOSTILE)
    assert [a.split(":")[0] for a in found["arms"]] == ["LoRA", "D2LoRA(4k, n)"]
    assert all(re.search("right|wrong", a) for a in found["arms"])
    assert "torch 2.13.0" in found["details"]
    assert (found["images"], found["harmed"]) == (0, "no")


@pytest.mark.browser
@needs_browser
def test_items_show_the_metric_of_their_cell(tmp_path: Path) -> None:
    cells = grid("task=lab_title", n=[100], m=[0, 4000])
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    found = in_page(
        tmp_path,
        """
        for (const metric of ["rouge1", "rouge2"]) {
          [...document.querySelectorAll(`table[aria-label^="lab_title: ${metric} "] td.open button`)][0].click();
          result[metric] = [...dialog.querySelectorAll(".item")].map((item) =>
            [parseInt(item.querySelector(".small").textContent.slice(5)), item.querySelector(".answers .small").textContent]);
        }
        """,
    )
    folder = tmp_path / "store" / "evaluate" / cells[0].chain.evaluations[0].key
    lines = (folder / "items.jsonl").read_text().splitlines()
    items = {item["index"]: item for item in map(json.loads, lines)}
    for metric, shown in found.items():
        assert shown == [[i, f"LoRA: {metric} {100 * items[i][metric]:.1f}"] for i, _ in shown]
        assert len(shown) > 3


@pytest.mark.browser
@needs_browser
def test_tables_sort_filters_narrow_and_points_tell(output: Path) -> None:
    found = in_page(
        output,
        """
        const table = document.querySelector("td.open").closest("table");
        const column = () => [...table.tBodies[0].rows].map((r) => parseFloat(r.cells[2].textContent));
        table.tHead.rows[0].cells[2].click(); result.down = column();
        table.tHead.rows[0].cells[2].click(); result.up = column();
        const hit = document.querySelector("figure:not(.differences) .hit"), apart = document.querySelector("figure.differences .hit");
        hit.dispatchEvent(new PointerEvent("pointerenter")); result.tip = [tip.hidden, tip.textContent];
        apart.dispatchEvent(new PointerEvent("pointerenter")); result.difference = tip.textContent;
        apart.dispatchEvent(new PointerEvent("click")); result.said = dialog.textContent; dialog.close();
        result.first = document.querySelector("figure").className;
        result.missing = document.querySelectorAll(".missing").length;
        const filter = document.querySelector("select[name=method]");
        filter.value = "dpo"; filter.dispatchEvent(new Event("change"));
        result.rows = [...document.querySelectorAll("th[scope=row]")].map((t) => t.textContent);
        result.curves = [...document.querySelectorAll("main .key:not(.shaded)")].map((t) => t.textContent);
        """,
    )
    assert found["first"] == "differences"
    difference = r"D2LoRA − LoRA: [+−]\d+\.\d\d points \[[+−]\d+\.\d, [+−]\d+\.\d\]"
    assert re.search(difference + ", undecided\naccuracy", found["difference"])
    assert re.search(difference + ".*not beyond chance; D2LoRA is undecided", found["said"])
    assert found["down"] == sorted(found["down"], reverse=True)
    assert found["up"] == sorted(found["up"])
    hidden, tip = found["tip"]
    assert not hidden
    assert re.search(r"accuracy \d+\.\d\d \[\d+\.\d, \d+\.\d\]\n40 items, seed 0\nrecord [0-9a-f]{20}", tip)
    assert found["missing"] > 0
    assert found["rows"]
    assert all(r.startswith("DPO") for r in [*found["rows"], *found["curves"]])


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_is_wider_than_the_window(output: Path, width: int) -> None:
    found = in_page(
        output,
        """
        document.querySelectorAll("details").forEach((d) => { d.open = true; });
        result.page = [document.documentElement.scrollWidth, innerWidth];
        document.querySelector("td.open button").click();
        result.dialog = [dialog.scrollWidth, dialog.clientWidth];
        """,
        width,
    )
    assert found["page"][0] <= found["page"][1]
    assert found["dialog"][0] <= found["dialog"][1]


@pytest.mark.browser
@needs_browser
def test_initializations_stand_side_by_side_and_filters_narrow_them(tmp_path: Path) -> None:
    inits = ("lora", "gaussian")
    cells = [c for i in inits for c in grid(f"init={i}", methods=("sft", "dpo"), n=[8], m=[0, 8])]
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    found = in_page(
        tmp_path,
        """
        const rows = () => [...document.querySelectorAll("table[aria-label^=Initializations] tbody tr")].map((r) => r.textContent);
        result.all = rows();
        const filter = document.querySelector("select[name=method]");
        filter.value = "sft"; filter.dispatchEvent(new Event("change"));
        result.sft = rows();
        """,
    )
    assert len(found["all"]) == 16  # two benchmarks, a row each
    assert len(found["sft"]) == 8
    assert all("SFT" in row for row in found["sft"])


@pytest.mark.browser
@needs_browser
def test_curves_can_be_told_apart_and_filters_leave_no_panel_twice(many: Path) -> None:
    found = in_page(
        many,
        """
        const panels = () => Object.fromEntries([...document.querySelectorAll("figure:not(.differences)")].filter((f) => f.textContent.startsWith("lab_math"))
          .map((f) => [f.querySelector("figcaption").textContent, [...f.querySelectorAll(".key")].map((k) => {
            const [line, dot] = [".curve", ".dot"].map((x) => k.querySelector(x)), style = getComputedStyle(line);
            return [k.textContent, [style.stroke, style.strokeDasharray, dot.getAttribute("d"), getComputedStyle(dot).fill].join()]; })]));
        result.all = panels();
        const differences = () => [...document.querySelectorAll("figure.differences figcaption")].map((f) => f.textContent).filter((t) => t.startsWith("lab_math"));
        result.differences = differences();
        for (const m of ["40", "0"]) { choose("m", m); result[m] = panels(); result[`differences ${m}`] = differences(); }
        """,
    )
    for caption, keys in found["all"].items():
        assert len({look for _, look in keys}) == len(keys) == 4, caption
    who = ("lab, lora", "lab, pissa", "llama-3.2-1b-instruct, lora")
    captions = [f"lab_math, {x}, D2LoRA({m}, n): accuracy in %" for x in who for m in (40, 8)]
    assert sorted(found["all"]) == captions
    apart = [caption.replace("accuracy in %", "accuracy: D2LoRA - LoRA in points") for caption in captions]
    assert sorted(found["differences"]) == apart
    assert sorted(found["differences 40"]) == [caption for caption in apart if "40" in caption]
    assert found["differences 0"] == []
    assert sorted(found["40"]) == [c for c in captions if "40" in c]
    assert len(found["0"]) == 3, "LoRA of each"
    assert {label for keys in found["0"].values() for label, _ in keys} == {"SFT LoRA", "DPO LoRA"}


@pytest.mark.browser
@needs_browser
def test_filters_narrow_comparisons_and_the_verdict_says_that_it_does_not_follow(many: Path) -> None:
    found = in_page(
        many,
        """
        const now = () => [document.querySelector(".verdict").textContent.slice(0, 20),
                           [...document.querySelector("table[aria-label=comparisons]").tBodies[0].rows].map((r) => r.cells[0].textContent)];
        result.all = now();
        choose("model", "llama-3.2-1b-instruct"); result.model = now();
        choose("m", "40"); result.m = now();
        choose("method", "dpo"); result.method = now();
        """,
    )
    rows = {key: labels for key, (_, labels) in found.items()}
    assert {key: len(labels) for key, labels in rows.items()} == {"all": 24, "model": 8, "m": 4, "method": 2}
    assert rows["method"] == [f"DPO m=40 n={n} llama-3.2-1b-instruct lora" for n in ("8", "1k")]
    assert found["all"][0].startswith("D2LoRA beats LoRA")
    assert all(found[key][0] == "Of the whole table, " for key in ("model", "m", "method"))


@pytest.mark.browser
@needs_browser
def test_words_in_a_column_of_numbers_come_last_and_thousands_are_thousands(tmp_path: Path) -> None:
    cells = [c for i in ("lora", "pissa") for c in grid(f"init={i}", n=[8, 1000], m=[0, 8], seed=[0, 1])]
    made.publish(tmp_path, cells, ability=lambda c: 5.0 if c.config.n == 8 else made.gain(c))
    report.write(tmp_path, ["mine"])
    found = in_page(
        tmp_path,
        """
        const sorted = (label, head) => {
          const table = document.querySelector(`table[aria-label^=${label}]`), heads = [...table.tHead.rows[0].cells];
          const column = heads.findIndex((x) => x.textContent === head);
          return [0, 1].map(() => { heads[column].click(); return [...table.tBodies[0].rows].map((r) => r.cells[column].textContent); });
        };
        result.preparation = sorted("Initializations", "preparation (s)");
        result.n = sorted("Initializations", "n");
        """,
    )
    for column, way in zip(found["preparation"], (-1, 1), strict=True):
        numbers = [float(x) for x in column if x != "-"]
        assert column == [*map(str, sorted(numbers, key=lambda x, way=way: way * x)), *["-"] * (len(column) // 2)]
    down, up = found["n"]
    assert (down[0], down[-1], up[0], up[-1]) == ("1k", "8", "8", "1k")


@pytest.mark.browser
@needs_browser
def test_a_cell_s_preparation_is_among_where_its_number_comes_from(many: Path) -> None:
    found = in_page(
        many,
        """
        choose("model", "lab");
        const row = [...document.querySelectorAll("tr")].find((r) => r.textContent.startsWith("SFT D2LoRA(8, n) lab pissa"));
        cell("SFT", row).click();
        result.stages = [...dialog.querySelectorAll("details h4")].map((x) => x.textContent.split(" ")[0]);
        result.records = dialog.querySelectorAll("details dl").length;
        """,
    )
    assert found["stages"] == ["evaluate", "adapt", "warmup", "prepare"]
    assert found["records"] == 4


@pytest.mark.browser
@needs_browser
def test_a_seed_that_one_side_lacks_is_said_and_no_other_stands_in_for_it(output: Path) -> None:
    found = in_page(
        output,
        """
        choose("sweep", "other");
        const arms = () => [[...dialog.querySelector(".item").querySelectorAll(".answers .small")].map((x) => x.textContent.split(":")[0]),
                            [...dialog.querySelectorAll("p.missing")].map((x) => x.textContent).filter((x) => x !== "no record")];
        const seed = (place) => { const x = dialog.querySelector("select"); x.selectedIndex = place; x.dispatchEvent(new Event("change")); };
        for (const label of ["SFT D2LoRA(4k, n), n=200", "SFT LoRA, n=200"]) {
          cell(label).click(); const before = arms(); seed(1);
          result[label] = [before, arms()];
        }
        dialog.close();
        const hit = [...document.querySelectorAll(".hit")].find((x) => x.ariaLabel.startsWith("SFT LoRA, n=200"));
        hit.dispatchEvent(new PointerEvent("pointerenter")); result.tip = tip.textContent;
        """,
    )
    tip = found.pop("tip")
    assert "seed 0; missing: seed 1\n" in tip
    for zero, one in found.values():
        assert zero == [["LoRA", "D2LoRA(4k, n)"], []]
        assert one == [["D2LoRA(4k, n)"], ["LoRA: no record of seed 1."]]


@pytest.mark.browser
@needs_browser
def test_the_base_stands_beside_every_seed(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[0], m=[0, 8], seed=[0, 1]))
    report.write(tmp_path, ["mine"])
    found = in_page(
        tmp_path,
        """
        for (const label of ["SFT D2LoRA(8, n), n=0", "SFT LoRA, n=0"]) {
          cell(label).click();
          const seed = dialog.querySelector("select"); seed.selectedIndex = 1; seed.dispatchEvent(new Event("change"));
          result[label] = [dialog.querySelectorAll(".item")[0].querySelectorAll(".answers > div").length, dialog.querySelectorAll(".missing").length];
        }
        """,
    )
    assert list(found.values()) == [[2, 0], [2, 0]]


@pytest.mark.browser
@needs_browser
def test_a_cell_shows_its_losses_its_counts_and_the_items_that_differ(output: Path) -> None:
    found = in_page(
        output,
        """
        cell("DPO D2LoRA(4k, n), n=200").click();
        result.text = dialog.textContent;
        result.losses = [...dialog.querySelectorAll("figure.losses figcaption")].map((x) => x.textContent);
        result.lines = [...dialog.querySelectorAll("figure.losses")].map((x) => x.querySelectorAll("svg[role=img] path.curve").length);
        const count = () => dialog.querySelectorAll(".item").length;
        result.before = count();
        const box = dialog.querySelector("input[name=flipped]");
        result.label = box.parentElement.textContent;
        box.click();
        result.after = count();
        result.verdicts = [...dialog.querySelectorAll(".item")].map((x) => [...x.querySelectorAll(".answers .small span")].map((v) => v.textContent).sort().join());
        """,
    )
    comparison = next(
        c
        for table in loaded(output, "mine")
        for p, c in table.pairs.items()
        if (p.method, p.n, p.benchmark) == ("dpo", 200, "lab_math")
    )
    counts = comparison.outcomes
    assert counts is not None
    assert f"both {counts.both}, D2LoRA alone {counts.d2lora_only}, LoRA alone {counts.lora_only}" in found["text"]
    assert found["losses"] == ["Loss of the adaptation", "Loss of the warm-up"]
    assert found["lines"] == [2, 1], "LoRA has no warm-up"
    assert 0 < found["after"] < found["before"]
    assert f"only the {found['after']} that differ" in found["label"]
    assert set(found["verdicts"]) == {"✓ right,✗ wrong"}


def loaded(output: Path, sweep: str) -> list[Table]:
    """Return the tables of a sweep."""
    return tables.build(points_of(report.manifest.read_manifest(output, sweep), Records(output)))


@pytest.mark.browser
@needs_browser
def test_sweeps_are_listed_by_date_with_what_they_have_and_numbers_round_as_in_the_terminal(tmp_path: Path) -> None:
    older = grid("sweep=older", n=[0, 100], m=[0])
    made.publish(tmp_path, older, provenance=lambda stage: made.PROVENANCE | {"started": "2025-05-05T05:05:00+00:00"})
    made.publish(tmp_path, grid("sweep=newer", n=[0, 200], m=[0, 4000]))
    report.everything(tmp_path, [])
    values = [40.625, 40.635, 0.125, 0.375, 2.675, 12.5, 99.995, -0.125, 33.333333]
    found = in_page(
        tmp_path,
        f"""
        result.rows = [...document.querySelectorAll("table[aria-label=Sweeps] tbody tr")].map((r) => [...r.cells].map((c) => c.textContent));
        result.links = [...document.querySelectorAll("section[id=sweep-newer] a")].map((a) => a.getAttribute("href"));
        result.two = {values}.map((x) => fixed(x, 2));
        result.one = {values}.map((x) => fixed(x, 1));
        result.none = [0.5, 1.5, 2.5].map((x) => fixed(x, 0));
        """,
    )
    assert [(row[0], row[1], row[2]) for row in found["rows"]] == [
        ("2026-01-01 00:00", "newer", "4 of 4"),
        ("2025-05-05 05:05", "older", "2 of 2"),
    ]
    assert "lab-math, SFT, lora, m=0,4k, n=0,200, 1 seed" in found["rows"][0][3]
    assert {"newer/table.csv", "newer/table.md"} <= set(found["links"])
    assert all((tmp_path / "report" / link).exists() for link in found["links"])
    assert found["two"] == [f"{x:.2f}" for x in values]
    assert found["one"] == [f"{x:.1f}" for x in values]
    assert found["none"] == ["0", "2", "2"]
