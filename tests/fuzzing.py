"""Deterministic bad input for `diffpref convert` and the perturber: damaged images and odd captions.

`python -m tests.fuzzing COUNT SEED` runs COUNT pairs through judge, part, decoder and rules, checks what must
hold of each, and prints the counts as JSON.
"""

from __future__ import annotations

import io
import json
import random
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageCms

from diffpref.captions.base import LEVELS
from diffpref.captions.rules import RulePerturber
from diffpref.data.images import MAX_PIXELS, image_size
from diffpref.data.judge import judge_all
from diffpref.data.pairs import open_pairs
from diffpref.data.parts import PartWriter, part_schema, read_tally, staged
from diffpref.data.sources.base import Candidate, Source

GOOD, BAD, EITHER = "good", "bad", "either"
PROMPTS = (Path(__file__).parent / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines()


class Bytes(NamedTuple):
    """An image cell and what must become of it."""

    data: Any
    fate: str


class Text(NamedTuple):
    """A caption cell and the reason for which its row must be dropped, "" for none."""

    value: Any
    reason: str


def sources(seed: int = 0) -> list[tuple[str, bytes]]:
    """(kind, file): sound images of every kind that decoders treat in a way of their own."""
    made: list[tuple[str, bytes]] = []
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, mode in enumerate(("RGB", "L", "CMYK")):
        plain = picture(seed + number, mode)
        kinds = ({}, {"progressive": True}, {"quality": 5, "subsampling": 2}, {"icc_profile": profile})
        made += [("JPEG", encoded(plain, "JPEG", **options)) for options in kinds]
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        exif[0x010E] = "about"
        turned = picture(turn, "RGB")
        made += [(kind, encoded(turned, kind, exif=exif)) for kind in ("JPEG", "WEBP", "PNG")]
    for number, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "I;16")):
        made.append(("PNG", encoded(picture(30 + number, mode), "PNG")))
    made.append(("PNG", encoded(picture(40, "P"), "PNG", transparency=0)))
    made.append(("PNG", encoded(picture(41, "P"), "PNG", transparency=bytes(range(16)))))
    made.append(("PNG", encoded(picture(42, "RGB"), "PNG", icc_profile=profile, dpi=(72, 72))))
    for kind in ("PNG", "WEBP"):
        first = picture(50, "RGB")
        frames = [first.rotate(180), first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        made.append((kind, encoded(first, kind, save_all=True, append_images=frames)))
    for options in ({}, {"lossless": True}, {"quality": 1}, {"icc_profile": profile}):
        made.append(("WEBP", encoded(picture(60, "RGB"), "WEBP", **options)))
        made.append(("WEBP", encoded(picture(61, "RGBA"), "WEBP", **options)))
    return made


def picture(seed: int, mode: str) -> Image.Image:
    draw = np.random.default_rng(seed)
    height, width = (int(side) for side in draw.integers(5, 40, 2))
    noise = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 65536, (height, width), dtype=np.uint16))
    image = Image.fromarray(noise)
    if mode == "P":
        return image.quantize(16)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise[..., 0]))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def spoilt(draw: random.Random, kind: str, data: bytes, other: bytes) -> Bytes:
    """A file damaged in one of many ways."""
    how = draw.randrange(13)
    at = draw.randrange(len(data))
    length = draw.randint(1, 40)
    if how == 0:
        return Bytes(data[: draw.randrange(len(data))], EITHER)
    if how in (1, 2, 3):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return Bytes(bytes(changed), EITHER)
    if how == 4:  # in the header, where sizes and tables stand
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(min(len(data), 48))] = draw.randrange(256)
        return Bytes(bytes(changed), EITHER)
    if how == 5:
        return Bytes(data[:at] + bytes(length) + data[at + length :], EITHER)
    if how == 6:
        return Bytes(data[:at] + data[at + length :], EITHER)
    if how == 7:
        return Bytes(data[:at] + data[at : at + length] * 2 + data[at + length :], EITHER)
    if how == 8:
        return Bytes(data[:at] + other[draw.randrange(len(other)) :], EITHER)
    if how == 9:
        return Bytes(data + draw.randbytes(length), GOOD)  # bytes behind an image are nobody's business
    if how == 10:
        return Bytes(huge(draw, kind, data), BAD)
    if how == 11:
        start = draw.choice(
            [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\1\0WEBPVP8X", b"GIF89a"]
        )
        return Bytes(start + draw.randbytes(draw.randint(0, 200)), EITHER if start else BAD)
    return Bytes(draw.choice(USELESS), BAD)


def huge(draw: random.Random, kind: str, data: bytes) -> bytes:
    """The file with a size in its header that is beyond any limit: a bomb without the pixels."""
    side = draw.choice([8193, 10_000, 16_383])
    if kind == "PNG":
        header = struct.pack(">II", side * draw.choice([1, 100_000]), side) + data[24:29]
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    if kind == "JPEG":
        at = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        return data[: at + 5] + struct.pack(">HH", side, side) + data[at + 9 :]
    canvas = struct.pack("<I", side - 1)[:3] * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + data[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


USELESS: list[Any] = [
    None, b"", b"\0", bytes(5000), b"<html>404</html>",
    *(encoded(picture(70, "RGB"), kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA")),
]  # fmt: skip


def caption(draw: random.Random) -> Text:
    """A caption of any kind that a file can hold."""
    how = draw.randrange(16)
    words = draw.choice(PROMPTS)
    if how == 0:
        return Text(draw.choice([None, "", " ", "\n\t", "\u3000\u2003", "\x1c\x1d"]), "no_caption")
    if how == 1:
        return Text(draw.choice([3, 2.5, b"bytes", ["a"], {"a": 1}, True]), "malformed_row")
    if how == 2:
        at = draw.randint(0, len(words))
        return Text(words[:at] + chr(draw.randint(0xD800, 0xDFFF)) + words[at:], "malformed_row")
    if how == 3:
        return Text("".join(point(draw) for _ in range(draw.randint(1, 60))) + "x", "")
    if how == 4:
        return Text(words + draw.choice("\0\x07\x1b\x7f\u2028\ufeff\ufffe") + words, "")
    if how == 5:
        return Text(draw.choice(["صورة قطة حمراء", "\u202eתמונה של חתול\u202c", "a \u2067red\u2069 cat"]), "")
    if how == 6:
        return Text(words + draw.choice(["👩‍🚀", "🏳️‍🌈", "🇩🇪", "❤️", "👍🏽"]) * draw.randint(1, 5), "")
    if how == 7:
        return Text("".join(letter + "\u0301\u0336\u0489" * 3 for letter in words[:50]) + "x", "")
    if how == 8 and draw.random() < 0.1:
        long = draw.choice([words + ", ", "a", ",", "(", "red ", "👩‍🚀", "a:1.3)", "\u0301", " and "])
        return Text("x" + long * (10_000 // len(long)), "")
    if how in (9, 10):
        letters = list(words)
        for _ in range(draw.randint(1, 6)):
            letters[draw.randrange(len(letters))] = point(draw)
        return Text("x" + "".join(letters), "")
    return Text(words, "")


def point(draw: random.Random) -> str:
    """Any code point that is no surrogate."""
    while True:
        number = draw.choice([draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)])
        if not 0xD800 <= number <= 0xDFFF:
            return chr(number)


def cases(count: int, seed: int) -> Iterator[tuple[Candidate, tuple[Bytes, Bytes], Text]]:
    made = sources()
    for row in range(count):
        draw = random.Random(seed * 1_000_003 + row)
        images = []
        for _ in range(2):
            (kind, data), (_, other) = draw.choice(made), draw.choice(made)
            images.append(Bytes(data, GOOD) if draw.random() < 0.45 else spoilt(draw, kind, data, other))
        text = caption(draw)
        label = draw.choice([0.0, 1.0])
        blobs = (images[0].data, images[1].data)
        yield Candidate("fuzz", row, f"row {row}", text.value, blobs, label), (images[0], images[1]), text


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Convert `count` cases and check each. Raises AssertionError with the row."""
    expected = list(cases(count, seed))
    source = Source(files={}, read=lambda wanted: iter(()))
    path = folder / "part-00000.parquet"
    kept: list[int] = []
    with staged(path) as stream, PartWriter(stream, part_schema(source)) as writer:
        for judged in judge_all((candidate for candidate, _, _ in expected), False, 0):
            writer.add(judged)
            check_fate(judged, *expected[judged.candidate.row])
            if judged.row is not None:
                kept.append(judged.candidate.row)
    tally = read_tally(path)
    assert (tally.read, tally.kept) == (count, len(kept))
    assert tally.read == tally.kept + sum(tally.dropped.values())
    check_part(path, [expected[row][0] for row in kept])
    perturbed = sum(check_rules(text.value, row) for row, (_, _, text) in enumerate(expected))
    return {"read": tally.read, "kept": tally.kept, "dropped": dict(tally.dropped), "perturbed": perturbed}


def check_fate(judged: Any, candidate: Candidate, images: tuple[Bytes, Bytes], text: Text) -> None:
    fates = [image.fate for image in images]
    where = (candidate.row, judged.reason, judged.text)
    if text.reason:
        assert judged.reason == text.reason, where
    elif BAD in fates:
        assert judged.reason == "bad_image", where
    elif fates == [GOOD, GOOD]:
        assert judged.reason in ("", "identical_images"), where
    assert (judged.row is None) == bool(judged.reason), where
    assert (judged.row is None) == bool(judged.text), where
    assert "\n" not in judged.text, where


def check_part(path: Path, candidates: list[Candidate]) -> None:
    """Every kept row stands in the part as it was found, and decodes."""
    table = pq.read_table(path).to_pylist()
    assert len(table) == len(candidates)
    for row, candidate in zip(table, candidates, strict=True):
        assert (row["source_row"], row["caption"]) == (candidate.row, candidate.caption)
        assert (row["jpg_0"], row["jpg_1"]) == candidate.images
    pairs = open_pairs(path, max_bad_share=0.0)
    assert len(pairs) == len(table)
    for index in range(len(pairs)):
        pair = pairs.try_load(index)
        assert pair is not None, candidates[index].row
        for image, data in zip((pair.winner_image, pair.loser_image), blobs(candidates[index]), strict=True):
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= MAX_PIXELS
            assert image_size(data) == image.size[::-1]


def blobs(candidate: Candidate) -> tuple[bytes, bytes]:
    """The winner's file and the loser's."""
    first, second = candidate.images
    return (first, second) if candidate.label == 1.0 else (second, first)


def check_rules(text: Any, row: int) -> bool:
    """Whether some level changed the caption; each level keeps its promises."""
    if not isinstance(text, str):
        return False
    changes = 0
    for level in LEVELS:
        (found,) = RulePerturber(level, seed=1)([text], [row])
        assert found.changed == (found.text != text), (row, level)
        assert found.changed or not found.edits, (row, level)
        assert found.failure == "", (row, level)
        assert found.text.strip() or not text.strip(), (row, level)
        assert encodes(found.text) or not encodes(text), (row, level)
        changes += found.changed
    return bool(changes)


def encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        report = run(int(sys.argv[1]), int(sys.argv[2]), Path(place))
    print(json.dumps(report))
