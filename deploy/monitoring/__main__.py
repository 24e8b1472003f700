"""`make monitoring`: writes dashboards and alerts to a folder, for Grafana and Prometheus without Helm as with it."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard as DashboardBuilder
from grafana_foundation_sdk.builders.dashboard import DatasourceVariable
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from divisi.deploy.monitoring.alerts import rules
from divisi.deploy.monitoring.panels import DASHBOARDS, Dashboard, Panel

_WIDTH, _HEIGHT = 12, 8
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


def spell(dashboard: Dashboard) -> str:
    """The dashboard as Grafana imports it."""
    builder = (
        DashboardBuilder(dashboard.title).uid(dashboard.uid).tags(["divisi"]).refresh("10s").time("now-30m", "now")
    )
    builder = builder.with_variable(DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
    for panel in dashboard.panels:
        builder = builder.with_panel(_panel(panel))
    return str(JSONEncoder(sort_keys=True, indent=2).encode(builder.build())) + "\n"


def _panel(panel: Panel) -> TimeSeries:
    made = TimeSeries().title(panel.title).unit(panel.unit).span(_WIDTH).height(_HEIGHT).datasource(_SOURCE).min(0)
    for place, (query, legend) in enumerate(panel.queries):
        target = Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + place)).datasource(_SOURCE)
        made = made.with_target(target)
    return made


def files() -> dict[str, str]:
    """Contents by path."""
    return {f"dashboards/{board.uid}.json": spell(board) for board in DASHBOARDS} | {"alerts.yaml": rules()}


def main(folder: Path) -> None:
    """Write them below `folder`."""
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
