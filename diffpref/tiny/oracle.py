"""The exact judge of the small world: parses an image into things and scores it against a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from diffpref.tiny.grammar import Claim, Noun, describe, noun_text, parse_prompt
from diffpref.tiny.render import signed_distance
from diffpref.tiny.scenes import COLORS, HUES, SIZE, Thing, relation

VERSION = "1"
FACTS_WEIGHT = 0.6
"""Share of faithfulness in the utility; style has the rest."""

MIN_CHROMA = 0.20
"""Pixels with max(RGB) - min(RGB) below this belong to the background or to an outline."""
MIN_AREA = 18
"""Fewer connected pixels than this are noise."""
MIN_MATCH = 0.62
"""Smallest intersection over union with the ideal shape for a region to be called by its name."""
UNKNOWN = "blob"

STYLE_PARTS = ("light", "plain", "outlined", "vivid", "large")
"""The stated taste: light, plain backgrounds; outlined, vivid, large things. Style is their mean."""


@dataclass(frozen=True)
class Parse:
    """What an image holds: things, and the style parts, each in 0..1."""

    things: tuple[Thing, ...]
    style: dict[str, float]

    @property
    def caption(self) -> str:
        """A caption of what the image shows, in the world's grammar, things from left to right."""
        return describe_things(self.things)


@dataclass(frozen=True)
class Judgement:
    """How well an image serves a prompt.

    `facts` is the fraction of the prompt's facts that hold, `style` the taste's score, both in 0..1;
    `utility = 0.6 facts + 0.4 style`. `held` and `failed` name the facts in words.
    """

    utility: float
    facts: float
    style: float
    all_correct: bool
    held: tuple[str, ...]
    failed: tuple[str, ...]
    kind: str
    caption: str


def _hue(pixels: np.ndarray) -> np.ndarray:
    """Hue in degrees of RGB pixels [..., 3]; 0 where grey."""
    high, low = pixels.max(-1), pixels.min(-1)
    chroma = np.maximum(high - low, 1e-6)
    r, g, b = np.moveaxis(pixels, -1, 0)
    sector = np.where(
        high == r, ((g - b) / chroma) % 6, np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    )
    return 60 * sector


def _color_index(pixels: np.ndarray) -> np.ndarray:
    hues = np.array([HUES[c] for c in COLORS])
    apart = abs(_hue(pixels)[..., None] - hues)
    return np.minimum(apart, 360 - apart).argmin(-1)


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """The ideal shape filling a box of height x width pixels, as a mask."""
    y, x = np.mgrid[0:height, 0:width]
    u = ((x + 0.5) / width * 2 - 1) * 100
    v = ((y + 0.5) / height * 2 - 1) * 100
    return signed_distance(shape, u, v, 100.0) <= 0


def _corners(mask: np.ndarray) -> tuple[float, float]:
    """Angular moments of order three and four of a region about its centroid, in -1..1.

    sum(r^n cos n(angle)) / sum(r^n): they keep telling corners apart when blur has rounded them. A circle has
    (0, 0), a square (0, -0.43), a diamond (0, 0.43), a triangle with its apex up (-0.65, 0.03).
    """
    y, x = (axis - axis.mean() for axis in np.nonzero(mask))
    squared = x * x + y * y
    third = (y**3 - 3 * x * x * y).sum() / max((squared**1.5).sum(), 1e-9)
    fourth = (x**4 - 6 * x * x * y * y + y**4).sum() / max((squared**2).sum(), 1e-9)
    return float(third), float(fourth)


def _name_shape(mask: np.ndarray) -> str:
    """The shape that a region has the corners of, if it fills its bounding box as that shape does."""
    third, fourth = _corners(mask)
    if third < -0.3:
        shape = "triangle"
    elif fourth < -0.2:
        shape = "square"
    else:
        shape = "diamond" if fourth > 0.17 else "circle"
    filled, ideal = ndimage.binary_fill_holes(mask), _template(shape, *mask.shape)
    return shape if (filled & ideal).sum() >= MIN_MATCH * (filled | ideal).sum() else UNKNOWN


def _regions(pixels: np.ndarray, colored: np.ndarray) -> list[tuple[Thing, np.ndarray]]:
    """Connected regions of one colour word, with their masks."""
    found = []
    index = np.full(colored.shape, -1)
    index[colored] = _color_index(pixels[colored])
    areas = np.bincount(index[colored], minlength=len(COLORS))
    for number, color in enumerate(COLORS):
        if areas[number] < MIN_AREA:
            continue
        labels, _ = ndimage.label(index == number)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == label
            if mask.sum() < MIN_AREA:
                continue
            rows, cols = box
            y, x = (rows.start + rows.stop) / 2, (cols.start + cols.stop) / 2
            radius = max(mask.shape) / 2
            thing = Thing(_name_shape(mask), color, x, y, radius)
            full = np.zeros(colored.shape, bool)
            full[box] = mask
            found.append((thing, full))
    return found


def _ramp(value: float, low: float, high: float) -> float:
    return float(np.clip((value - low) / (high - low), 0, 1))


def _style(
    pixels: np.ndarray, regions: list[tuple[Thing, np.ndarray]], colored: np.ndarray
) -> dict[str, float]:
    luminance = pixels.mean(-1)
    away = ~ndimage.binary_dilation(colored, iterations=5)
    background = (
        luminance[away] if away.sum() >= 64 else luminance[~colored] if (~colored).any() else luminance
    )
    parts = {
        "light": _ramp(float(np.median(background)), 0.15, 0.9),
        "plain": 1 - _ramp(float(background.std()), 0.008, 0.032),
        "outlined": 0.0,
        "vivid": 0.0,
        "large": 0.0,
    }
    if not regions:
        return parts
    edges, vivid, areas = [], [], []
    level = float(np.median(background))
    for _, mask in regions:
        core = ndimage.binary_erosion(mask) if mask.sum() > 40 else mask
        core = core if core.any() else mask
        color = np.median(pixels[core], axis=0)
        vivid.append((color.max() - color.min()) / max(float(color.max()), 1e-6))
        ring = ndimage.binary_dilation(mask, iterations=2) & ~mask & ~colored
        # an outline is darker than both neighbours on light and mid tones, lighter than both on dark ones
        line = luminance[ring]
        inside = float(luminance[core].mean())
        if line.size:
            strong = np.percentile(line, 80) if level < 0.35 else np.percentile(line, 20)
            gap = strong - max(level, inside) if level < 0.35 else min(level, inside) - strong
            edges.append(_ramp(float(gap), 0.02, 0.12))
        areas.append(np.sqrt(mask.sum() + 0.35 * ring.sum() * (edges[-1] if edges else 0)))
    parts["outlined"] = float(np.mean(edges)) if edges else 0.0
    parts["vivid"] = _ramp(float(np.mean(vivid)), 0.50, 0.88)
    parts["large"] = _ramp(float(np.mean(areas)), 9.0, 17.0)
    return parts


def describe_things(things: tuple[Thing, ...]) -> str:
    """A caption of these things in the world's grammar, from left to right."""
    return describe(sorted(things, key=lambda t: (round(t.x / 4), t.y)))


def find_things(image: Image.Image) -> tuple[Thing, ...]:
    """The things that `image` shows, of any mode and size."""
    pixels, colored = _pixels(image)
    return tuple(thing for thing, _ in _regions(pixels, colored))


def parse_image(image: Image.Image) -> Parse:
    """What `image` shows. Any mode and size: it is converted to RGB and resized to 64 x 64 if it must be."""
    pixels, colored = _pixels(image)
    regions = _regions(pixels, colored)
    return Parse(tuple(thing for thing, _ in regions), _style(pixels, regions, colored))


def _pixels(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """RGB in 0..1 at the world's size, and which pixels are coloured."""
    picture = image.convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize(
            (SIZE, SIZE), Image.Resampling.BOX if min(picture.size) > SIZE else Image.Resampling.BILINEAR
        )
    pixels = np.asarray(picture, dtype=np.float64) / 255
    return pixels, (pixels.max(-1) - pixels.min(-1)) >= MIN_CHROMA


def _matches(thing: Thing, noun: Noun) -> bool:
    return thing.shape == noun.shape and noun.color in (None, thing.color)


def _related(things: tuple[Thing, ...], claim: Claim) -> bool:
    first, second = claim.nouns
    return any(
        a is not b and _matches(a, first) and _matches(b, second) and relation(a, b) == claim.relation
        for a in things
        for b in things
    )


def check_facts(things: tuple[Thing, ...], claim: Claim) -> dict[str, bool]:
    """Each fact of a claim in words, and whether it holds of these things.

    Facts are: the number of things in all; for each noun its shape (often enough, or exactly as often
    when a number is given); for each coloured noun its colour on that shape; the relation.
    """
    total = claim.total
    facts = {f"{total} thing{'s' if total != 1 else ''} in all": len(things) == total}
    for noun in claim.nouns:
        wanted = sum(n.count for n in claim.nouns if n.shape == noun.shape)
        shown = sum(t.shape == noun.shape for t in things)
        facts[noun_text(wanted, None, noun.shape)] = shown == wanted if noun.count > 1 else shown >= wanted
        if noun.color:
            matching = sum(_matches(t, noun) for t in things)
            facts[noun_text(noun.count, noun.color, noun.shape)] = matching >= noun.count
    if claim.relation:
        first, second = (noun_text(n.count, n.color, n.shape) for n in claim.nouns)
        facts[f"{first} {claim.relation} {second}"] = _related(things, claim)
    return facts


def reads_all(image: Image.Image, things: tuple[Thing, ...]) -> bool:
    """Whether the oracle finds these very shapes and colours in `image`, and what a caption says of them."""
    seen = parse_image(image).things
    looks = [sorted((t.shape, t.color) for t in each) for each in (seen, things)]
    return looks[0] == looks[1] and all(check_facts(seen, parse_prompt(describe(things))).values())


def judge(image: Image.Image, prompt: str) -> Judgement:
    """Scores `image` against `prompt`.

    Raises:
        UserError: the prompt is not in the world's grammar (never for an image).
    """
    claim = parse_prompt(prompt)
    parse = parse_image(image)
    facts = check_facts(parse.things, claim)
    share = sum(facts.values()) / len(facts)
    style = float(np.mean([parse.style[part] for part in STYLE_PARTS]))
    return Judgement(
        utility=FACTS_WEIGHT * share + (1 - FACTS_WEIGHT) * style,
        facts=share,
        style=style,
        all_correct=all(facts.values()),
        held=tuple(fact for fact, holds in facts.items() if holds),
        failed=tuple(fact for fact, holds in facts.items() if not holds),
        kind=claim.kind,
        caption=parse.caption,
    )
