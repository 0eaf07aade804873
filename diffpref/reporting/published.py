"""Tables from papers, for a report to print beside one's own numbers."""

from __future__ import annotations

import tomllib
from typing import Any

from diffpref.paths import share_dir


def published_tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of ``eval/published.toml`` that share a metric with the report.

    ``report`` needs ``metrics`` and ``results`` as ``compare`` gives them. Columns of metrics that the report
    lacks are left out, and rows without any value then. ``own`` are the report's own means by model, on the
    scale of the source.

    Returns:
        Per table: source, link, protocol, metrics (``{name, label, scale}``), rows and own
        (``{model, values}``, values as in the file).
    """
    with open(share_dir("eval") / "published.toml", "rb") as stream:
        known = tomllib.load(stream)
    tables = []
    for table in known["tables"]:
        kept = [index for index, name in enumerate(table["metrics"]) if name in report["metrics"]]
        names = [table["metrics"][index] for index in kept]
        rows = [{"model": row["model"], "values": [row["values"][i] for i in kept]} for row in table["rows"]]
        rows = [row for row in rows if any(value != "" for value in row["values"])]
        if not rows or not kept:
            continue
        own = [
            {"model": model, "values": [results[n]["mean"] * known["metrics"][n]["factor"] for n in names]}
            for model, results in report["results"].items()
        ]
        metrics = [
            {"name": n, "label": report["metrics"][n]["label"], "scale": known["metrics"][n]["scale"]}
            for n in names
        ]
        about = {key: table[key] for key in ("source", "link", "protocol")}
        tables.append({**about, "metrics": metrics, "rows": rows, "own": own})
    return tables
