"""HTML pages from templates: untrusted text is escaped, and a name that is missing is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2


def rendered(template: Path, filters: dict[str, Callable[..., str]], **values: object) -> bytes:
    """A template's page, in UTF-8.

    Args:
        template: a Jinja file.
        filters: what it may call on values, by name.
        values: what it may name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values).encode()
