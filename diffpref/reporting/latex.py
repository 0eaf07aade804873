"""The main table in LaTeX, in the style of the package booktabs."""

from __future__ import annotations

from typing import Any

from diffpref.reporting import formatting as show
from diffpref.reporting.tables import best_models, protocol

_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", show.MINUS: "$-$", show.DASH: "--", "“": "``", "”": "''", "×": r"$\times$",
}  # fmt: skip


def escape(text: str) -> str:
    """Plain text as LaTeX prints it."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex_table(report: dict[str, Any]) -> str:
    """A ``table`` environment: a model's means in one line, their intervals below, best means bold.

    An up or down arrow marks a model better or worse than the baseline after Holm's correction. ``report`` is
    what ``write_report`` returns. Needs ``\\usepackage{booktabs}``.
    """
    metrics, primary = report["metrics"], report["primary"]
    head = ["Model", *(_heading(about) for about in metrics.values())]
    head.append(rf"$W$ {escape(metrics[primary]['label'])} (\%)")
    body = [_rows(report, name) for name in report["results"]]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(report)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        (r" \addlinespace" + "\n").join(body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _heading(about: dict[str, Any]) -> str:
    arrow = r"$\uparrow$" if about["higher_is_better"] else r"$\downarrow$"
    unit = r" (\%)" if about["share"] else ""
    return f"{escape(about['label'])}{unit} {arrow}"


def _rows(report: dict[str, Any], name: str) -> str:
    means, ends = [escape(name)], [""]
    for metric, about in report["metrics"].items():
        result = report["results"][name][metric]
        mean = _number(result["mean"], about)
        bold = rf"\textbf{{{mean}}}" if name in best_models(report, metric) else mean
        means.append(bold + _mark(result.get("verdict", "")))
        ends.append(_interval(result["interval"], about))
    result = report["results"][name][report["primary"]]
    share = {"share": True, "decimals": None}
    if "win_rate" in result:
        means.append(_number(result["win_rate"], share) + _mark(result["win_verdict"]))
        ends.append(_interval(result["win_rate_interval"], share))
    else:
        means.append("--")
        ends.append("")
    return " & ".join(means) + " \\\\\n" + " & ".join(ends) + r" \\"


def _number(value: float, about: dict[str, Any]) -> str:
    """In percent without the sign where it is a share: that stands in the heading."""
    return escape(show.number(value, about["share"], about["decimals"]).removesuffix(" %"))


def _interval(ends: list[float] | None, about: dict[str, Any]) -> str:
    if ends is None:
        return ""
    low, high = (_number(end, about) for end in ends)
    return rf"{{\scriptsize [{low}, {high}]}}"


def _mark(verdict: str) -> str:
    return {"better": r"$^{\uparrow}$", "worse": r"$^{\downarrow}$"}.get(verdict, "")


def _caption(report: dict[str, Any]) -> str:
    base = report["baseline"]
    marks = (
        f"Bold: best mean; in brackets its interval; arrows: better or worse than {base}, corrected p below "
        f"0.05. W: win rate against {base}."
    )
    return escape(f"{report['title']}. {protocol(report)} {marks}")
