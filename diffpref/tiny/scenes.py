"""Scenes: what an image of the small world holds, said and unsaid, and how scenes are drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

SIZE = 64
"""Side of an image in pixels."""

SHAPES = ("circle", "square", "triangle", "diamond")
DRAWABLE = (*SHAPES, "cross")
"""The autoencoder first learns one shape more than captions and the oracle know."""
HUES = {"red": 357.0, "yellow": 52.0, "green": 125.0, "cyan": 185.0, "blue": 228.0, "purple": 287.0}
"""Hue of each colour word in degrees; neighbours are at least 40 degrees apart."""
COLORS = tuple(HUES)

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six task kinds of GenEval (arXiv 2310.11513), by its own tags."""

TONES = ("light", "mid", "dark")
TEXTURES = ("plain", "stripes", "checks")

MARGIN = 2.5
GAP = 5.0
RADII = {"small": (7.5, 9.0), "large": (10.5, 12.5)}
CROWDED = 0.9
"""Three things are drawn this much smaller, so that they fit."""


@dataclass(frozen=True)
class Thing:
    """One shape. Centre and radius in pixels: the radius of the circle, half the side of the bounding box
    of every other shape."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Style:
    """What captions leave unsaid."""

    tone: str
    lightness: float
    texture: str
    outline: bool
    saturation: float
    size: str


@dataclass(frozen=True)
class Scene:
    """One to three things in one style; `kind` says which GenEval task its caption belongs to."""

    kind: str
    things: tuple[Thing, ...]
    style: Style


def relation(first: Thing, second: Thing) -> str:
    """Where `first` is as seen from `second`, along the axis in which their centres differ most."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def sample_style(rng: np.random.Generator) -> Style:
    tone = TONES[rng.integers(3)]
    low, high = {"light": (0.86, 0.97), "mid": (0.52, 0.66), "dark": (0.10, 0.22)}[tone]
    vivid = rng.random() < 0.5
    return Style(
        tone=tone,
        lightness=float(rng.uniform(low, high)),
        texture=TEXTURES[rng.integers(3)],
        outline=bool(rng.random() < 0.5),
        saturation=float(rng.uniform(0.86, 0.95) if vivid else rng.uniform(0.48, 0.58)),
        size="large" if rng.random() < 0.5 else "small",
    )


def _looks(rng: np.random.Generator, kind: str, shapes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(shape, colour) of each thing of a scene of this kind."""

    def look() -> tuple[str, str]:
        return shapes[rng.integers(len(shapes))], COLORS[rng.integers(len(COLORS))]

    if kind in ("single_object", "colors"):
        return [look()]
    if kind == "counting":
        return [look()] * int(rng.integers(2, 4))
    if kind in ("two_object", "position"):
        (a, color_a), (b, color_b) = look(), look()
        while b == a:
            b, color_b = look()
        return [(a, color_a), (b, color_b)]
    if kind == "color_attr":
        number = 3 if rng.random() < 0.25 else 2
        looks: list[tuple[str, str]] = []
        while len(looks) < number:
            candidate = look()
            if candidate[1] not in (color for _, color in looks):
                looks.append(candidate)
        return looks
    raise ValueError(f"unknown kind {kind!r}; one of {KINDS}")


def _clear_axis(first: Thing, second: Thing) -> bool:
    """Whether nobody could argue about the relation of the two."""
    small, large = sorted((abs(first.x - second.x), abs(first.y - second.y)))
    return large >= 1.4 * small + 3


def place(rng: np.random.Generator, looks: list[tuple[str, str]], size: str) -> tuple[Thing, ...]:
    """Positions by rejection: inside the frame, boxes GAP apart, and for two things a clear relation."""
    low, high = (r * (CROWDED if len(looks) > 2 else 1) for r in RADII[size])
    while True:
        things: list[Thing] = []
        for shape, color in looks:
            for _ in range(40):
                radius = float(rng.uniform(low, high))
                border = radius + MARGIN
                x, y = (float(v) for v in rng.uniform(border, SIZE - border, 2))
                if all(max(abs(x - t.x), abs(y - t.y)) >= radius + t.radius + GAP for t in things):
                    things.append(Thing(shape, color, x, y, radius))
                    break
        if len(things) == len(looks) and (len(looks) != 2 or _clear_axis(*things)):
            return tuple(things)


def sample_scene(
    rng: np.random.Generator, kind: str | None = None, shapes: tuple[str, ...] = SHAPES
) -> Scene:
    """A random scene of `kind`, or of a kind drawn uniformly."""
    kind = kind or KINDS[rng.integers(len(KINDS))]
    style = sample_style(rng)
    return Scene(kind, place(rng, _looks(rng, kind, shapes), style.size), style)


def with_style(scene: Scene, style: Style) -> Scene:
    """The same things in another style (their sizes stay)."""
    return replace(scene, style=style)
