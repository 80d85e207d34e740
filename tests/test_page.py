"""The report's page: self-contained, safe with any text, and working in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import made
import numpy as np
import pytest
from test_report import grid

from d2lora import report
from d2lora.report import page

HOSTILE = "</script><img src=x onerror=\"document.body.dataset.harmed='yes'\">\u2028{{x}} & <b>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


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


def in_page(output: Path, script: str, width: int = 1400) -> dict:
    """Open a copy of the page in headless Chromium, run `script` there, and return what it puts into `result`."""
    text = (output / "report" / "index.html").read_text()
    closing = "<script>const result = {};\ntry {" + script + "} catch (e) { result.error = String(e); }\n"
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
        const hit = document.querySelector(".hit");
        hit.dispatchEvent(new PointerEvent("pointerenter")); result.tip = [tip.hidden, tip.textContent];
        result.missing = document.querySelectorAll(".missing").length;
        const filter = document.querySelector("select[name=method]");
        filter.value = "dpo"; filter.dispatchEvent(new Event("change"));
        result.rows = [...document.querySelectorAll("th[scope=row]")].map((t) => t.textContent);
        result.curves = [...document.querySelectorAll(".key")].map((t) => t.textContent);
        """,
    )
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
        const rows = () => [...document.querySelectorAll("table[aria-label=initializations] tbody tr")].map((r) => r.textContent);
        result.all = rows();
        const filter = document.querySelector("select[name=method]");
        filter.value = "sft"; filter.dispatchEvent(new Event("change"));
        result.sft = rows();
        """,
    )
    assert len(found["all"]) == 8
    assert len(found["sft"]) == 4
    assert all("SFT" in row for row in found["sft"])


@pytest.mark.browser
@needs_browser
def test_curves_can_be_told_apart_and_filters_leave_no_panel_twice(tmp_path: Path) -> None:
    cells = [
        c for i in ("lora", "gaussian") for c in grid(f"init={i}", methods=("sft", "dpo"), n=[8, 16], m=[0, 8, 40])
    ]
    made.publish(tmp_path, cells)
    report.write(tmp_path, ["mine"])
    found = in_page(
        tmp_path,
        """
        const panels = () => Object.fromEntries([...document.querySelectorAll("figure")].filter((f) => f.textContent.startsWith("lab_math"))
          .map((f) => [f.querySelector("figcaption").textContent, [...f.querySelectorAll(".key")].map((k) => {
            const [line, dot] = [".curve", ".dot"].map((x) => k.querySelector(x)), style = getComputedStyle(line);
            return [k.textContent, [style.stroke, style.strokeDasharray, dot.tagName, getComputedStyle(dot).fill].join()]; })]));
        result.all = panels();
        for (const m of ["40", "0"]) {
          const filter = document.querySelector("select[name=m]");
          filter.value = m; filter.dispatchEvent(new Event("change"));
          result[m] = panels();
        }
        """,
    )
    for caption, keys in found["all"].items():
        assert len({look for _, look in keys}) == len(keys) == 4, caption
    captions = [f"lab_math, {init}, D2LoRA({m}, n): accuracy in %" for init in ("gaussian", "lora") for m in (8, 40)]
    assert sorted(found["all"]) == sorted(captions)
    assert sorted(found["40"]) == [c for c in captions if "40" in c]
    assert len(found["0"]) == 2, "LoRA of each initialization"
    assert {label for keys in found["0"].values() for label, _ in keys} == {"SFT LoRA", "DPO LoRA"}
