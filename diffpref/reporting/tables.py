"""The report's main table and sentences as text."""

from __future__ import annotations

from typing import Any

from diffpref.reporting import formatting as show


def markdown_table(report: dict[str, Any]) -> str:
    """The main table in Markdown: mean and difference with intervals per metric, win rate in the primary one.

    ``report`` is what ``write_report`` returns.
    """
    metrics, primary = report["metrics"], report["primary"]
    head = [
        "model",
        *(about["label"] for about in metrics.values()),
        f"win rate ({metrics[primary]['label']})",
        "p",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, results in report["results"].items():
        cells = [name]
        for metric, about in metrics.items():
            result = results[metric]
            mean = show.number(result["mean"], about["share"])
            if "difference" in result:
                change = show.change(result["difference"], about["share"])
                ends = show.change_interval(result["difference_interval"], about["share"])
                mean += f" ({change}; {ends})"
            cells.append(mean)
        result = results[primary]
        if "win_rate" in result:
            rate, ends = (
                show.number(result["win_rate"], True),
                show.interval(result["win_rate_interval"], True),
            )
            cells += [f"{rate} ({ends})", show.p_value(result["p_holm"])]
        else:
            cells += [show.DASH, show.DASH]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """One sentence: how many candidates beat the baseline in the primary metric, and which is best.

    Where no mean is clearly better, it names those whose win rate is above one half with its whole interval.
    """
    names, base = report["candidates"], report["baseline"]
    label = report["metrics"][report["primary"]]["label"].lower()
    cells = {name: report["results"][name][report["primary"]] for name in names}
    better = [name for name in names if cells[name]["verdict"] == "better"]
    if len(names) == 1:
        verdict = cells[names[0]]["verdict"]
        if verdict == "no clear difference":
            return f"No clear difference in {label} between {names[0]} and {base}."
        return f"{names[0]} is {verdict} than {base} in {label}."
    if not better:
        text = f"None of the {len(names)} models is clearly better than {base} in mean {label}"
        winning = [name for name in names if cells[name]["win_rate_interval"][0] > 0.5]
        if winning:
            verb = "wins" if len(winning) == 1 else "win"
            text += f", yet {', '.join(winning)} {verb} more prompts than {base}"
        return f"{text}."
    best = max(better, key=lambda name: abs(cells[name]["difference"]))
    count = "All" if len(better) == len(names) else f"{len(better)} of"
    verb = "is" if len(better) == 1 else "are"
    return f"{count} {len(names)} models {verb} better than {base} in {label}; {best} gains the most."


def sentence(report: dict[str, Any], name: str) -> str:
    """What one candidate's numbers in the primary metric say, in words."""
    about = report["metrics"][report["primary"]]
    base = report["results"][report["baseline"]][report["primary"]]
    cell = report["results"][name][report["primary"]]
    share = about["share"]
    return (
        f"{cell['verdict'][0].upper()}{cell['verdict'][1:]}. {about['label']} goes from "
        f"{show.number(base['mean'], share)} to {show.number(cell['mean'], share)} "
        f"({show.change(cell['difference'], share)}{' points' if share else ''}, 95 % interval "
        f"{show.change_interval(cell['difference_interval'], share)}). It wins {cell['wins']}, ties "
        f"{cell['ties']} and loses {cell['losses']} of {report['prompt_count']} prompts: win rate "
        f"{show.number(cell['win_rate'], True)} "
        f"(95 % interval {show.interval(cell['win_rate_interval'], True)})."
    )
