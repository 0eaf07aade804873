"""The report's main table and sentences as text."""

from __future__ import annotations

from typing import Any

from diffpref.reporting import formatting as show
from diffpref.reporting.comparison import NO_CLEAR_DIFFERENCE
from diffpref.texts import markdown

WINS = {"better": "more wins", "worse": "more losses", NO_CLEAR_DIFFERENCE: NO_CLEAR_DIFFERENCE}
"""What a verdict on wins is called."""


def markdown_table(report: dict[str, Any]) -> str:
    """The main table in Markdown: mean and difference with intervals per metric, p-value and win rate of the
    primary one.

    The best mean of a metric is bold. ``report`` is what ``write_report`` returns.
    """
    metrics, primary = report["metrics"], report["primary"]
    head = ["model", *(markdown(heading(about)) for about in metrics.values())]
    label = markdown(metrics[primary]["label"])
    head += [f"p ({label})", f"win rate ({label})", "p (win rate)"]
    lines = []
    for name, results in report["results"].items():
        cells = [markdown(name)]
        for metric, about in metrics.items():
            mean = show.number(results[metric]["mean"], about["share"], about["decimals"])
            cells.append(f"**{mean}**" if name in best_models(report, metric) else mean)
            cells[-1] += _ends(results[metric], about)
        lines.append([*cells, *_win_rate(results[primary])])
    return _markdown([head, *lines])


def markdown_report(report: dict[str, Any]) -> str:
    """The main table, a table for each metric by kind of prompt, and how all of it was made, in Markdown."""
    brackets = f"In brackets: the change against {report['baseline']} with its interval."
    parts = [f"# {markdown(report['title'])}", markdown(report["headline"]), markdown_table(report)]
    parts += [markdown(f"{protocol(report)} {brackets}")]
    parts += [f"- {markdown(note)}" for note in (*report["setting_differences"], *report["notes"])]
    if len(report["kinds"]) > 1:
        for metric, about in report["metrics"].items():
            parts += [f"## {markdown(about['label'])} by kind of prompt", _kind_table(report, metric)]
    return "\n\n".join(parts) + "\n"


def protocol(report: dict[str, Any]) -> str:
    """How images, scores and intervals of a table were made, for its caption."""
    suite = report["suite"]
    drawn = [f"{suite['scheduler'].upper()}, {suite['steps']} steps"] if "steps" in suite else []
    drawn += [f"guidance {suite['guidance']:g}"] if "guidance" in suite else []
    drawn += [f"{suite['width']}x{suite['height']} pixels"] if "width" in suite else []
    dtype = report["models"][report["baseline"]]["dtype"]
    drawn += [str(dtype)] if dtype else []
    settings = f" ({', '.join(drawn)})" if drawn else ""
    judges = "; ".join(
        f"{name} version {about['version']}{_precision(about)}"
        for name, about in report["evaluators"].items()
    )
    return (
        f"{report['prompt_count']} prompts of {suite.get('name') or 'the suite'}, {report['image_count']} "
        f"images per model{settings}. Means over prompts, 95 % bootstrap intervals over prompts. Win rate: "
        f"share of prompts with a better score than {report['baseline']}, ties half, with Wilson's "
        f"interval or the bootstrap's where that is wider. p by sign flips of means and exact sign tests of "
        f"win rates, with Holm's correction over both, all models and metrics. Evaluators: {judges}."
    )


def heading(about: dict[str, Any]) -> str:
    """Label of a metric with an arrow in its good direction."""
    return f"{about['label']} {'↑' if about['higher_is_better'] else '↓'}"


def best_models(report: dict[str, Any], metric: str) -> list[str]:
    """Models whose mean, as it is printed, is the best of all; several where they print the same."""
    about = report["metrics"][metric]
    means = {name: results[metric]["mean"] for name, results in report["results"].items()}
    best = (max if about["higher_is_better"] else min)(means.values())
    printed = show.number(best, about["share"], about["decimals"])
    return [n for n, mean in means.items() if show.number(mean, about["share"], about["decimals"]) == printed]


def _in_sentence(label: str) -> str:
    """A common word ("Utility") in small letters; a name ("PickScore", "HPS v2.1") as it is."""
    return label.lower() if label[1:].isalpha() and label[1:].islower() else label


def _precision(about: dict[str, Any]) -> str:
    dtype = about.get("dtype", "fp32")
    return "" if dtype == "fp32" else f" in {dtype}"


def _kind_table(report: dict[str, Any], metric: str) -> str:
    about = report["metrics"][metric]
    rows = [["kind", "prompts", *map(markdown, report["results"])]]
    for kind, part in report["kinds"].items():
        cells = [
            show.number(results[metric]["mean"], about["share"], about["decimals"])
            + _ends(results[metric], about)
            for results in part["results"].values()
        ]
        rows.append([markdown(str(kind).replace("_", " ")), str(part["prompts"]), *cells])
    return _markdown(rows)


def _ends(result: dict[str, Any], about: dict[str, Any]) -> str:
    """Change and its interval in brackets; of the baseline, the interval of its mean."""
    share, decimals = about["share"], about["decimals"]
    if "difference" not in result:
        return f" ({show.interval(result['interval'], share, decimals)})"
    ends = show.change_interval(result["difference_interval"], share, decimals)
    return f" ({show.change(result['difference'], share, decimals)}; {ends})"


def _win_rate(result: dict[str, Any]) -> list[str]:
    if "win_rate" not in result:
        return [show.DASH] * 3
    ends = show.interval(result["win_rate_interval"], True)
    rate = f"{show.number(result['win_rate'], True)} ({ends})"
    return [show.p_value(result["p_holm"]), rate, show.p_value(result["win_rate_p_holm"])]


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def headline(report: dict[str, Any]) -> str:
    """One sentence: how many candidates beat the baseline in the primary metric, and which is best.

    It claims what the corrected p-values allow: of means first, and of win rates where they say otherwise.
    """
    names, base = report["candidates"], report["baseline"]
    label = _in_sentence(report["metrics"][report["primary"]]["label"])
    cells = {name: report["results"][name][report["primary"]] for name in names}
    better = [name for name in names if cells[name]["verdict"] == "better"]
    wins = _wins_apart(cells, base)
    if len(names) == 1:
        verdict = cells[names[0]]["verdict"]
        if verdict == NO_CLEAR_DIFFERENCE:
            return f"No clear difference in mean {label} between {names[0]} and {base}{wins}."
        return f"{names[0]} is {verdict} than {base} in mean {label}{wins}."
    if not better:
        return f"None of the {len(names)} models is clearly better than {base} in mean {label}{wins}."
    best = max(better, key=lambda name: abs(cells[name]["difference"]))
    count = "All" if len(better) == len(names) else f"{len(better)} of"
    verb = "is" if len(better) == 1 else "are"
    gains = f"{best} gains the most{wins}"
    return f"{count} {len(names)} models {verb} better than {base} in mean {label}; {gains}."


def _wins_apart(cells: dict[str, dict[str, Any]], base: str) -> str:
    """What win rates say that means do not: ", yet sft wins more prompts than base"."""
    parts = []
    for verdict, verb in (("better", "win"), ("worse", "lose")):
        found = [name for name, cell in cells.items() if cell["win_verdict"] == verdict != cell["verdict"]]
        if found:
            names = f"{', '.join(found[:-1])} and {found[-1]}" if len(found) > 1 else found[0]
            s = "s" if len(found) == 1 else ""
            parts.append(f"{names} {verb}{s} more prompts {'than' if verb == 'win' else 'to'} {base}")
    return f", yet {' and '.join(parts)}" if parts else ""


def sentence(report: dict[str, Any], name: str) -> str:
    """What one candidate's numbers in the primary metric say, in words."""
    about = report["metrics"][report["primary"]]
    base = report["results"][report["baseline"]][report["primary"]]
    cell = report["results"][name][report["primary"]]
    share, decimals = about["share"], about["decimals"]
    return (
        f"{cell['verdict'][0].upper()}{cell['verdict'][1:]} in the mean. {about['label']} goes from "
        f"{show.number(base['mean'], share, decimals)} to {show.number(cell['mean'], share, decimals)} "
        f"({show.change(cell['difference'], share, decimals)}{' points' if share else ''}, 95 % interval "
        f"{show.change_interval(cell['difference_interval'], share, decimals)}, "
        f"p {show.p_value(cell['p_holm'])}). "
        f"It wins {cell['wins']}, ties {cell['ties']} and loses {cell['losses']} of {report['prompt_count']} "
        f"prompts: win rate {show.number(cell['win_rate'], True)} "
        f"(95 % interval {show.interval(cell['win_rate_interval'], True)}), p "
        f"{show.p_value(cell['win_rate_p_holm'])}: {WINS[cell['win_verdict']]}."
    )
