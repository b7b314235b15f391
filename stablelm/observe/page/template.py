"""Templates of pages that need no script and no network."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from stablelm.printable import printable


@cache
def page_template(folder: Path, name: str) -> tuple[Any, Any, str]:
    """The template `folder/name`, the style `folder/style.css`, and the Content-Security-Policy that allows this style
    and pictures within the page. Raises OSError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Nothing of a file reaches the page with marks that turn text around.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    style = (folder / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return environment.get_template(name), Markup(style), policy
