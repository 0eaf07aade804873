"""What lies in a folder of images: every file in it is an image, a caption, or named as left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffpref.errors import UserError
from diffpref.files import inside, open_file, read_text, reason_of

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".dng", ".gif", ".heic", ".heif", ".hif", ".icns", ".ico",
    ".j2c", ".j2k", ".jfif", ".jif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl",
    ".pbm", ".pgm", ".pjp", ".pjpeg", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".svg", ".tga", ".tif", ".tiff",
    ".webp",
))  # fmt: skip
"""Endings of images, whether they can be decoded or not: a bad image is never overlooked."""
CAPTION_SUFFIXES = (".txt", ".caption")
_SYSTEM = frozenset((".DS_Store", "Thumbs.db", "desktop.ini", ".scores", ".git", ".cache"))
_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"8BPS")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_SHOWN = 5


@dataclass
class Listing:
    """Paths below a folder, with "/". texts: caption files by the path without ending; linked: links to
    folders; left_out: the rest."""

    images: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def list_folder(folder: Path) -> Listing:
    """Look through a folder and those below it. Images are known by their ending, else by their first bytes.

    Broken links and pipes with an image's name are images (which cannot be read); hidden files and links to
    folders are left out. Raises UserError when a folder cannot be read.
    """
    found = Listing()
    for path in sorted(_walk(folder, found), key=lambda path: path.split("/")):
        name, suffix = os.path.splitext(path)
        if os.path.basename(path).startswith("."):
            found.left_out.append(path)
        elif suffix.lower() in CAPTION_SUFFIXES:
            found.texts.setdefault(name, []).append(path)
        elif suffix.lower() in IMAGE_SUFFIXES or _starts_as_image(folder / path):
            found.images.append(path)
        else:
            found.left_out.append(path)
    return found


def _walk(folder: Path, found: Listing) -> Iterator[str]:
    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read", why=str(error.strerror)) from error

    for place, folders, files in os.walk(folder, onerror=failed):
        below = os.path.relpath(place, folder)
        below = "" if below == "." else f"{below}/"
        for name in list(folders):
            link = os.path.islink(os.path.join(place, name))
            if link or name.startswith("."):
                folders.remove(name)
                if name not in _SYSTEM:
                    (found.linked if link else found.left_out).append(f"{below}{name}")
        yield from (below + name for name in files if name not in _SYSTEM)


def _starts_as_image(path: Path) -> bool:
    try:
        with open_file(path) as stream:
            start = stream.read(16)
    except OSError:
        return False
    return (
        start.startswith(_STARTS)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )


def warn_of(paths: Sequence[str], folder: Path, why: str) -> None:
    """One warning that names files of a folder and says why they are not used; none without files."""
    if paths:
        shown = ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if paths[_SHOWN:] else "")
        log.warning(
            "%s: %d %s: %s", folder, len(paths), f"files {why}" if paths[1:] else f"file {why}", shown
        )


def within(folder: Path, name: str | Path) -> Path:
    """A file of the folder. Raises UserError for a link out of it: what it holds would show up in tables and
    reports."""
    try:
        inside(name, folder)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read", why=reason_of(error)) from error
    return folder / name


def entry_of(path: str, texts: Sequence[str], folder: Path) -> dict[str, str]:
    """An image of a folder as a row of a list, with the prompt that stands beside it. Raises UserError."""
    found = {_text_of(within(folder, text)) for text in texts}
    if len(found) > 1:
        raise UserError(f"{folder / path} has two prompts", why=f"{' and '.join(texts)} differ")
    return {"file": path, **({"prompt": found.pop()} if found else {})}


def _text_of(path: Path) -> str:
    try:
        return read_text(path).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read", why=reason_of(error)) from error
