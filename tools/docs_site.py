"""Hooks of mkdocs: pages are written to be read in the repository, where links lead out of docs/ too.

CONTRIBUTING, SECURITY and CHANGELOG become pages of the site. Links to other files of the repository, which the site
does not have, become their names. A link to a file that does not exist is left as it is, for --strict to find.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<to>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for name in PROJECT:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=rewritten(text, "")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in PROJECT:
        return markdown
    return rewritten(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)))


def rewritten(markdown: str, folder: str) -> str:
    """Return a page of the repository's `folder` with its links as the site needs them."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["to"]))
        anchor = match["anchor"] or ""
        if target == "README.md":
            return f"[{match['text']}]({relative('docs/index.md', folder)})"
        if target in PROJECT or target.startswith("docs/"):
            return f"[{match['text']}]({relative(target, folder)}{anchor})"
        if (ROOT / target).exists():
            return match["text"] if match["text"] == f"`{target}`" else f"{match['text']} (`{target}`)"
        return match[0]

    return LINK.sub(link, markdown)


def relative(target: str, folder: str) -> str:
    """Return the link from a page of `folder` to a page; the site has docs/ and the files above it in one folder."""
    inside = target.removeprefix("docs/")
    return posixpath.relpath(inside, folder.removeprefix("docs").strip("/") or ".")
