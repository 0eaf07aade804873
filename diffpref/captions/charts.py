"""The histograms of a captions report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from diffpref.reporting.histograms import Series, histogram


def token_charts(tokens: dict[str, Any]) -> dict[str, Markup]:
    """By role, with the encoder's limit; `tokens` as in the report."""
    longest = max(role["max"] for role in tokens["roles"].values())
    return {
        role: histogram(
            f"Tokens of captions: {role}",
            "tokens",
            tokens["edges"],
            [Series(role, numbers["counts"])],
            mark=(tokens["limit"] + 1, f"limit {tokens['limit']}"),
            open_end=longest >= tokens["edges"][-1],
        )
        for role, numbers in tokens["roles"].items()
    }


def likeness_chart(near: dict[str, Any]) -> Markup:
    """How alike the two captions of a pair are; `near` as in the report."""
    return histogram(
        "Similarity of the two captions of a pair",
        "similarity",
        near["edges"],
        [Series("pairs", near["counts"])],
        mark=(near["threshold"], f"near-duplicates, from {near['threshold']}"),
    )


def clip_charts(similarity: dict[str, Any]) -> dict[str, tuple[Markup, list[tuple[str, str, float]]]]:
    """For both captions and the prompt: a drawing, and style, label and mean of its two series."""
    wanted = {
        "winner": ("Winner's caption", "winner_own", "own image", "winner_other", "loser's image"),
        "loser": ("Loser's caption", "loser_own", "own image", "loser_other", "winner's image"),
        "prompt": ("Prompt", "prompt_winner", "winner's image", "prompt_loser", "loser's image"),
    }
    return {
        title: (
            histogram(
                f"{title}: CLIP similarity",
                "cosine",
                similarity["edges"],
                [
                    Series(first_label, similarity[first]["counts"]),
                    Series(second_label, similarity[second]["counts"], "loss", outline=True),
                ],
            ),
            [
                ("win", first_label, similarity[first]["mean"]),
                ("loss", second_label, similarity[second]["mean"]),
            ],
        )
        for title, first, first_label, second, second_label in wanted.values()
        if first in similarity
    }
