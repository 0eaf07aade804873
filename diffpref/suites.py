"""Prompt suites: which prompts, seeds and sampler settings a set of images is made with.

A suite is one TOML file::

    name = "tiny"
    description = "Held-out prompts of the small world, six kinds."
    license = "Apache-2.0"
    scheduler = "ddim"        # ddim, euler, dpmsolver++ or pndm
    steps = 20
    guidance = 5.0
    width = 64
    height = 64
    negative_prompt = ""
    seeds = [0]               # each prompt is drawn once per seed

    [[prompts]]
    text = "a red circle left of a blue square"
    kind = "position"         # tables are split by kind

or, in place of the prompts, the file that holds them::

    prompts_file = "PartiPrompts.tsv"   # from this file's folder; a hub id where format is given
    format = "parti"                    # a name of prompt_lists.FORMATS, or "auto" (default)
    kind_column = "Challenge"           # other columns than the format's own; prompt_column likewise

A list of prompts can be given as a suite by itself (``parti:PartiPrompts.tsv``, ``prompts.txt``), with the
sampler settings on the command line.
"""

from __future__ import annotations

import logging
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffpref.errors import UserError, nearest
from diffpref.files import parse_toml, read_text, reason_of
from diffpref.paths import fingerprint, share_dir
from diffpref.prompt_lists import FORMATS, SUFFIXES, read_prompts
from diffpref.texts import is_blank

log = logging.getLogger("diffpref")

SCHEDULERS = ("ddim", "euler", "dpmsolver++", "pndm")
_LIST_KEYS = {"format": "auto", "prompt_column": "", "kind_column": ""}
_SEED_STRIDE = 1_000_003  # a prime well above any suite's number of prompts


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite. ``id`` is its position in the file, ``kind`` the row it counts in."""

    id: int
    text: str
    kind: str = "all"


@dataclass(frozen=True)
class PlannedImage:
    """One image that a suite asks for; ``seed`` gives the same image in plain diffusers."""

    id: str
    prompt: Prompt
    sample: int
    seed: int

    @property
    def file(self) -> str:
        return f"images/{self.id}.png"


@dataclass(frozen=True)
class Suite:
    """Prompts and the sampler settings that give their scores a meaning."""

    name: str
    scheduler: str
    steps: int
    guidance: float
    width: int
    height: int
    prompts: tuple[Prompt, ...] = field(repr=False)
    description: str = ""
    license: str = ""
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (0,)

    def settings(self) -> dict[str, Any]:
        """Everything but the prompts that decides what the images look like."""
        values = asdict(self)
        for key in ("prompts", "description", "license"):
            del values[key]
        return {**values, "seeds": list(self.seeds)}

    def fingerprint(self) -> str:
        """sha256 of settings and prompts; changes when any image of the suite would."""
        return fingerprint({**self.settings(), "prompts": [[p.text, p.kind] for p in self.prompts]})

    def images(self, limit: int = 0) -> list[PlannedImage]:
        """The images in order, prompt by prompt; ``limit`` keeps so many prompts (0: all) by `spread`."""
        prompts = spread(self.prompts, limit) if limit else self.prompts
        return [
            PlannedImage(f"{prompt.id:05d}-s{sample}", prompt, sample, image_seed(sample, prompt.id))
            for prompt in prompts
            for sample in self.seeds
        ]


def spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts in their order, each kind in proportion to its share; a larger limit keeps them all.

    Suites are sorted by kind, so the first prompts would be of one kind.
    """
    totals = Counter(prompt.kind for prompt in prompts)
    seen: Counter[str] = Counter()
    places: list[tuple[float, int]] = []
    for number, prompt in enumerate(prompts):
        places.append(((seen[prompt.kind] + 0.5) / totals[prompt.kind], number))
        seen[prompt.kind] += 1
    return [prompts[number] for number in sorted(number for _, number in sorted(places)[:limit])]


def image_seed(sample: int, prompt_id: int) -> int:
    """Seed of the initial noise of one image: ``sample * 1000003 + prompt_id``.

    Every model draws a prompt from the same noise, so differences between models are paired; each prompt
    has noise of its own, so prompts are independent of one another, as the intervals over prompts assume.
    """
    return sample * _SEED_STRIDE + prompt_id


def load_suite(name_or_path: str | Path, sampling: Mapping[str, Any] | None = None) -> Suite:
    """Read a shipped suite by name (``"tiny"``), a TOML file, or a list of prompts.

    A list is a file or folder of `prompt_lists`, or ``FORMAT:PLACE`` with a hub id as well. sampling:
    settings by their key in the TOML file, which win over those there; a list has no others.

    Raises:
        UserError: no such suite, not TOML, a key that is unknown, missing, mistyped or out of range, or a
            list that cannot be read.
    """
    spec, options = str(name_or_path), dict(sampling or {})
    form, _, place = spec.partition(":")
    if form in FORMATS and place:
        return _of_list(place, form, options)
    if Path(spec).is_dir() or Path(spec).suffix.lower() in SUFFIXES:
        return _of_list(spec, "auto", options)
    path = _find(spec)
    try:
        table = parse_toml(read_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file", why=str(error)) from error
    except OSError as error:
        raise UserError(f"cannot read the suite {path}", why=reason_of(error)) from error
    return _Reader(path).suite({**table, **options})


def sampling_arguments(sampling: Mapping[str, Any]) -> list[str]:
    """The command line's options for these settings."""
    words: list[str] = []
    for key, value in sampling.items():
        if key not in ("width", "height"):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
    if "width" in sampling:
        words += ["--size", f"{sampling['width']}x{sampling['height']}"]
    return words


def _of_list(place: str, form: str, options: dict[str, Any]) -> Suite:
    needed = {"steps": "--steps", "guidance": "--guidance", "width": "--size", "height": "--size"}
    missing = list(dict.fromkeys(option for key, option in needed.items() if key not in options))
    if missing:
        raise UserError(
            f"{place} says nothing of how to draw its prompts",
            why="a score has no meaning without scheduler, steps, guidance, size and seeds",
            fix=f"give {', '.join(missing)}, or a TOML suite with prompts_file (see docs/evaluation.md)",
        )
    name = form if form not in ("auto", "prompts") else Path(place).stem
    table = {"name": name, "prompts_file": place, "format": form, **options}
    return _Reader(Path(place), Path()).suite(table)


def shipped_suites() -> list[str]:
    """Names of the suites that come with diffpref."""
    return sorted(path.stem for path in (share_dir("eval") / "suites").glob("*.toml"))


def name_hint(name: str, known: Iterable[str]) -> str:
    """What helps with a misspelt name: the nearest known one, and all of them."""
    names = sorted(known)
    close = nearest(name, names)
    listed = f"known: {', '.join(names) if names else 'none'}"
    return f"did you mean {close!r}? {listed}" if close else listed


def _find(spec: str) -> Path:
    path = Path(spec)
    if path.is_file():
        return path
    if path.suffix != ".toml" and "/" not in spec:
        shipped = share_dir("eval") / "suites" / f"{spec}.toml"
        if shipped.is_file():
            return shipped
        raise UserError(f"there is no suite named {spec!r}", fix=name_hint(spec, shipped_suites()))
    beside = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    raise UserError(f"there is no suite file {spec}", fix=name_hint(path.name, beside or shipped_suites()))


class _Reader:
    """Strict reading of one table; every complaint names file, key and what would be right."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """root: where a relative prompts_file starts; by default the folder of `path`."""
        self.path, self.root = path, path.parent if root is None else root

    def suite(self, table: dict[str, Any]) -> Suite:
        known = {
            "name", "description", "license", "scheduler", "steps", "guidance", "width", "height",
            "negative_prompt", "seeds", "prompts", "prompts_file", *_LIST_KEYS,
        }  # fmt: skip
        self._only(table, known, "")
        scheduler = self._text(table, "scheduler", "ddim")
        if scheduler not in SCHEDULERS:
            raise self._wrong("scheduler", f"{scheduler!r} is unknown", name_hint(scheduler, SCHEDULERS))
        return Suite(
            name=self._text(table, "name", self.path.stem),
            description=self._text(table, "description", ""),
            license=self._text(table, "license", ""),
            scheduler=scheduler,
            steps=self._integer(table, "steps", 1, 1000),
            guidance=self._guidance(table),
            width=self._side(table, "width"),
            height=self._side(table, "height"),
            negative_prompt=self._text(table, "negative_prompt", ""),
            seeds=self._seeds(table),
            prompts=self._prompts(table) if "prompts_file" not in table else self._listed(table),
        )

    def _wrong(self, key: str, why: str, fix: str = "") -> UserError:
        return UserError(f"{self.path}: {key}", why=why, fix=fix)

    def _only(self, table: dict[str, Any], known: set[str], where: str) -> None:
        for key in table:
            if key not in known:
                raise self._wrong(f"{where}{key}", "unknown key", name_hint(key, known))

    def _text(self, table: dict[str, Any], key: str, default: str) -> str:
        value = table.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, f"must be text, not {value!r}")
        return value

    def _integer(self, table: dict[str, Any], key: str, low: int, high: int) -> int:
        if key not in table:
            raise self._wrong(key, "missing", f"give a whole number from {low} to {high}")
        value = table[key]
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, f"must be a whole number from {low} to {high}, not {value!r}")
        return value

    def _side(self, table: dict[str, Any], key: str) -> int:
        value = self._integer(table, key, 8, 8192)
        if value % 8:
            raise self._wrong(key, f"must be a multiple of 8, not {value}", f"use {round(value / 8) * 8}")
        return value

    def _guidance(self, table: dict[str, Any]) -> float:
        if "guidance" not in table:
            raise self._wrong("guidance", "missing", "give a number from 0 to 100, such as 7.5")
        value = table["guidance"]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 <= value <= 100:
            raise self._wrong("guidance", f"must be a number from 0 to 100, not {value!r}")
        return float(value)

    def _seeds(self, table: dict[str, Any]) -> tuple[int, ...]:
        seeds = table.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds:
            raise self._wrong("seeds", "must be a list with at least one seed, such as [0]")
        for seed in seeds:
            if type(seed) is not int or not 0 <= seed < 2**31:
                raise self._wrong("seeds", f"a seed is a whole number from 0 to 2147483647, not {seed!r}")
        if len(set(seeds)) != len(seeds):
            raise self._wrong("seeds", "a seed stands twice: the same image would count twice")
        return tuple(seeds)

    def _listed(self, table: dict[str, Any]) -> tuple[Prompt, ...]:
        """Prompts of prompts_file; one that stands there again is left out."""
        if "prompts" in table:
            raise self._wrong("prompts_file", "there are [[prompts]], too", "keep one of them")
        source, form, prompt_column, kind_column = (
            self._text(table, key, default) for key, default in (("prompts_file", ""), *_LIST_KEYS.items())
        )
        beside = self.root / Path(source).expanduser()
        found = read_prompts(str(beside) if beside.exists() else source, form, prompt_column, kind_column)
        kinds: dict[str, str] = {}
        for text, kind in found:
            kinds.setdefault(text, kind)
        if len(kinds) < len(found):
            log.warning(
                "%s: %d of %d prompts stand there more than once and are drawn once",
                source, len(found) - len(kinds), len(found),
            )  # fmt: skip
        return tuple(Prompt(index, text, kind) for index, (text, kind) in enumerate(kinds.items()))

    def _prompts(self, table: dict[str, Any]) -> tuple[Prompt, ...]:
        for key in _LIST_KEYS:
            if key in table:
                raise self._wrong(key, "has no effect without prompts_file")
        rows = table.get("prompts")
        if not isinstance(rows, list) or not rows:
            raise self._wrong("prompts", "there are none", "add [[prompts]] tables with text and kind")
        prompts: list[Prompt] = []
        seen: dict[str, int] = {}
        for index, row in enumerate(rows):
            where = f"prompts[{index}]."
            if not isinstance(row, dict):
                raise self._wrong(where[:-1], "must be a table with text and kind")
            self._only(row, {"text", "kind"}, where)
            text, kind = row.get("text"), row.get("kind", "all")
            if not isinstance(text, str) or is_blank(text):
                raise self._wrong(f"{where}text", "must be text that is not empty")
            if not isinstance(kind, str) or not kind.strip():
                raise self._wrong(f"{where}kind", "must be text that is not empty")
            if text in seen:
                why = (
                    f"{text!r} stands at prompts[{seen[text]}] too: it would count as two independent prompts"
                )
                raise self._wrong(f"{where}text", why, "for more images of a prompt add seeds")
            seen[text] = index
            prompts.append(Prompt(index, text, kind))
        return tuple(prompts)
