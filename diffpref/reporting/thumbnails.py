"""Images small enough to travel inside a page."""

from __future__ import annotations

import base64
import io

from PIL import Image

PIXEL_ART = 128  # up to this side images are kept pixel by pixel and enlarged without smoothing
THUMBNAIL = 320


def embed(image: Image.Image, side: int = THUMBNAIL, quality: int = 85) -> str:
    """A data URI: lossless for pixel art, else a WebP of at most `side` pixels a side."""
    buffer = io.BytesIO()
    if max(image.size) <= PIXEL_ART:
        image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    else:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
