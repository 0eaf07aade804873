"""A self-contained HTML page from a template: styles and script inside, everything else escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diffpref.reporting import formatting

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, styles: Sequence[str], script: str, **values: Any) -> str:
    """The page. `style` and `script` are the contents of the named files, `show` formats numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["show"] = formatting
    return environment.get_template(template).render(
        style=Markup("".join(_content(name) for name in styles)), script=Markup(_content(script)), **values
    )


def _content(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
