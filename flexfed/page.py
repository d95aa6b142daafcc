"""A comparison as one HTML page: charts to point at and its tables; it needs no server and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from flexfed.charts import COLOURS, EFFORTS, Effort, Line, is_wide, lines, name_of, scale_of
from flexfed.compare import Comparison
from flexfed.tables import TextTable, tables

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .6em 0 2em; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
code { background: #f4f4f4; padding: .2em .4em }
.wide { overflow-x: auto }
"""


def to_html(comparison: Comparison, command: str) -> str:
    """The page, with everything it needs in it (4.8 MB, of which plotly's JavaScript is nearly all).

    Args:
        comparison: of finished runs; its metrics are what the charts can show.
        command: that made it, without machine paths.
    """
    chart = _figure(comparison).to_html(
        full_html=False, include_plotlyjs=True, config={"displaylogo": False}, div_id="chart"
    )  # an id of its own: the same comparison gives the same page
    parts = [f"<h1>{escape(comparison.title)}</h1>", f"<p><code>{escape(command)}</code></p>", chart]
    parts += ["<p>Means over seeds, bands are their range. Click a name to hide a row, twice to see it alone.</p>"]
    parts += [_table(table) for table in tables(comparison)]
    parts += [f"<p>{escape(note)}</p>" for note in comparison.notes]
    head = f'<meta charset="utf-8"><title>{escape(comparison.title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in table.body)
    return f'<p>{escape(table.caption)}</p>\n<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _figure(comparison: Comparison) -> Figure:
    """Two panels, one for each effort; a menu chooses the metric, another the scale of the efforts."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(EFFORTS), shared_yaxes=True, horizontal_spacing=0.03)
    owners: list[str] = []  # of each trace, the metric that it shows
    for metric in comparison.metrics:
        for panel, effort in enumerate(EFFORTS, 1):
            for trace in _traces(comparison, metric, effort, is_first=panel == 1):
                figure.add_trace(trace, row=1, col=panel)
                owners.append(metric)
    first = comparison.metrics[0]
    for trace, owner in zip(figure.data, owners, strict=True):
        trace.visible = owner == first
    for panel, effort in enumerate(EFFORTS, 1):
        scale = "log" if is_wide(lines(comparison, first, effort)) else "linear"
        figure.update_xaxes(title=effort.label, type=scale, row=1, col=panel)
    figure.update_yaxes(title=name_of(first), row=1, col=1)
    menus = [_metric_menu(comparison.metrics, owners), _scale_menu()]
    figure.update_layout(template="plotly_white", height=560, updatemenus=menus, margin={"t": 70}, hovermode="closest")
    return figure


def _traces(comparison: Comparison, metric: str, effort: Effort, is_first: bool) -> list[Any]:
    """Band and line of each row; the rows' names stand in the legend once."""
    places = {row.name: place for place, row in enumerate(comparison.rows)}
    return [
        trace
        for line in lines(comparison, metric, effort)
        for trace in _row_traces(line, places[line.label], scale_of(metric), is_first)
    ]


def _row_traces(line: Line, place: int, scale: float, is_first: bool) -> list[Any]:
    from plotly.graph_objects import Scatter

    mean, low, high = ([scale * value for value in part] for part in (line.mean, line.low, line.high))
    colour, dash = COLOURS[place % len(COLOURS)], _DASHES[place // len(COLOURS) % len(_DASHES)]
    ring = {"x": [*line.spent, *reversed(line.spent)], "y": [*high, *reversed(low)]}
    band = Scatter(
        **ring, fill="toself", fillcolor=_faint(colour), line={"width": 0}, mode="lines",
        legendgroup=line.label, showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    told = "round %{customdata[0]}: %{y:.2f} (%{customdata[1]:.2f} to %{customdata[2]:.2f}) at %{x:.4g}"
    curve = Scatter(
        x=line.spent, y=mean, name=line.label, legendgroup=line.label, showlegend=is_first, mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2}, marker={"size": 5},
        customdata=list(zip(line.rounds, low, high, strict=True)), hovertemplate=told,
    )  # fmt: skip
    return [band, curve]


def _faint(colour: str) -> str:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return f"rgba({red}, {green}, {blue}, 0.1)"


def _metric_menu(metrics: Sequence[str], owners: Sequence[str]) -> dict[str, Any]:
    def button(metric: str) -> dict[str, Any]:
        seen = [owner == metric for owner in owners]
        return {"label": metric, "method": "update", "args": [{"visible": seen}, {"yaxis.title.text": name_of(metric)}]}

    return {"buttons": [button(metric) for metric in metrics], "x": 0, "xanchor": "left", "y": 1.14, "yanchor": "top"}


def _scale_menu() -> dict[str, Any]:
    axes = ["xaxis.type", *(f"xaxis{panel}.type" for panel in range(2, len(EFFORTS) + 1))]
    buttons = [
        {"label": f"{scale} scale", "method": "relayout", "args": [dict.fromkeys(axes, kind)]}
        for scale, kind in (("logarithmic", "log"), ("linear", "linear"))
    ]
    return {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.14, "yanchor": "top", "showactive": False}
