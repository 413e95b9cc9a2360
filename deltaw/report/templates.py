"""The templates of all pages, and their one style sheet."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

HERE = Path(__file__).parent


def template(name: str) -> Template:
    """The template of this name; everything in it is escaped but SVGs."""
    # The file name ends in .jinja, so escaping by file name would be off: it is switched on for everything.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    environment.globals["css"] = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(name)
