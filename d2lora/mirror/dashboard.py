"""Write a sweep's dashboard, a W&B report: accuracy over n, loss curves, tables and figures.

`python -m d2lora dashboard SWEEP` writes it with wandb-workspaces (the extra `dashboard`) and prints its address.
"""

import csv
from pathlib import Path
from typing import Any

from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.stages.adapt import AdaptSpec
from d2lora.stages.warmup import WarmupSpec


def main_metrics(output: Path, sweep: str) -> list[str]:
    """Return each benchmark's first metric, as W&B has it (benchmark/metric). UserError for a sweep without results."""
    file = Outputs(output).results
    metrics: dict[str, str] = {}
    if file.exists():
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row["sweep"] == sweep and row["metric"]:
                    metrics.setdefault(row["benchmark"], f"{row['benchmark']}/{row['metric']}")
    if not metrics:
        raise UserError(f"sweep={sweep}: no results in {file}: python run.py -cn {sweep}")
    return list(metrics.values())


def report(sweep: str, metrics: list[str], entity: str, project: str) -> Any:
    """Return the W&B report of a sweep, not saved. `metrics` as main_metrics gives them."""
    import wandb_workspaces.reports.v2 as wr

    def runs(kind: str, by: str) -> Any:
        filters = f"Metric('Group') = '{sweep}' and Metric('JobType') = '{kind}'"
        return wr.Runset(name=kind, filters=filters, groupby=[by] if by else [])  # of the report's own project

    # list[Any]: the library's lists are of unions, and lists are invariant.
    over_n: list[Any] = [wr.ScatterPlot(title=f"{m} over n", x=wr.Config("n"), y=wr.SummaryMetric(m)) for m in metrics]
    curves: list[Any] = [
        wr.LinePlot(title=name, x="samples_seen", y=[f"train/{name}"], title_x="samples seen")
        for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "tokens_per_second")
    ]
    results: list[Any] = [
        wr.WeavePanelSummaryTable(table_name="results"),
        wr.MediaBrowser(title="figures", media_keys=["curves", "tables"]),
    ]
    blocks: list[Any] = [
        wr.H2("Accuracy over n"),
        wr.PanelGrid(runsets=[runs("cell", "config.arm")], panels=over_n),
        wr.H2("Training, over samples seen"),
        wr.PanelGrid(runsets=[runs(AdaptSpec.KIND, ""), runs(WarmupSpec.KIND, "")], panels=curves),
        wr.H2("Tables and figures"),
        wr.PanelGrid(runsets=[runs("report", "")], panels=results),
    ]
    return wr.Report(project=project, entity=entity, title=f"d2lora · {sweep}", blocks=blocks, width="fluid")


def write(output: Path, sweep: str, entity: str | None, project: str) -> str:
    """Write a sweep's dashboard to W&B anew and return its address; the sweep's results are in `output`.

    UserError for a sweep without results, without the extra, or for a server that does not take it.
    """
    return _save(sweep, main_metrics(output, sweep), entity, project)


def _save(sweep: str, metrics: list[str], entity: str | None, project: str) -> str:
    """Save the report and return its address. UserError without the extra or a server that takes it."""
    try:
        import wandb
        import wandb_workspaces  # noqa: F401

        saved = report(sweep, metrics, entity or wandb.Api(timeout=30).default_entity or "", project)
        saved.save()
    except ImportError:
        raise UserError("the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'") from None
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"W&B did not take the report: {line}") from None
    return saved.url
