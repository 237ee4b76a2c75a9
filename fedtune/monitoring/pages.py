"""A page of ours: one file with its script and style, shown under a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

__all__ = ["load_page"]

_BASE = "/* base.css */"


def load_page(package: str, name: str) -> tuple[str, dict[str, str]]:
    """A page, and the headers that it is sent with.

    Args:
        package: that has the page's file.
        name: of the file; where its style says `/* base.css */` it gets the style of all pages.

    Returns:
        (HTML, headers): by them a browser runs the page's own script and style, asks the page's own service,
        and does no more.
    """
    base = files("fedtune.monitoring").joinpath("base.css").read_text(encoding="utf-8")
    page = files(package).joinpath(name).read_text(encoding="utf-8").replace(_BASE, base)

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(one.encode()).digest() for one in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src "
        "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
