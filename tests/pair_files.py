"""Small Parquet files of pairs, made for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def image_bytes(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


RED, BLUE = image_bytes((255, 0, 0)), image_bytes((0, 0, 255))


def row(label: Any = 1.0, **changes: Any) -> dict[str, Any]:
    """Image 0 is red, image 1 is blue."""
    columns = {"caption": "a prompt", "jpg_0": RED, "jpg_1": BLUE, "label_0": label}
    return columns | changes


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, group: int = 1000) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def colour(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel
