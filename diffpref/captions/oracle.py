"""The small world's oracle as a captioner: it says exactly what an image of that world shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffpref.captions.base import Captioned, Provenance

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_THINGS = 12
"""The world draws up to six things, and a bad image of it shows a few more; a photograph falls into dozens."""


@dataclass(frozen=True)
class OracleCaptioner:
    """The exact judge of the small world (tiny:pairs): number, colours, shapes and positions of the things.

    A region without a clear shape is a "blob", an image without things "a picture of nothing".
    """

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        """A caption of what each image shows, in the world's grammar; prompts and rows change nothing."""
        if not len(images) == len(prompts) == len(rows):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(rows)} rows")
        return [_caption(image) for image in images]

    def provenance(self) -> Provenance:
        """The version of the oracle."""
        from diffpref.tiny.oracle import VERSION

        return Provenance("oracle", revision=VERSION)


def _caption(image: Image) -> Captioned:
    from diffpref.tiny.oracle import describe_things, find_things  # scipy is slow to import

    things = find_things(image)
    if len(things) > MOST_THINGS:
        return Captioned("", f"no image of the small world: {len(things)} coloured regions")
    return Captioned(describe_things(things) if things else "a picture of nothing")
