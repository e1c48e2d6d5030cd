"""The site builds with --strict and without a network, its pages fetch nothing, and every page can be reached."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import ROOT, pages

LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)")
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(?P<url>(?:https?:)?//[^"'\s>]+)""")
PATHS = re.compile(r"`((?:tests|tools|examples|megatron_ettin)/[\w./-]+)`")
TOPICS = ("prepare", "data", "mixtures", "phases", "layouts", "precision", "slurm", "faults", "release", "planning")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.md"))]


def test_docs_site_strict_build_fetches_nothing(tmp_path: Path) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("mkdocs", reason="wants the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = tmp_path / "site"
    for name in names(ROOT / "docs"):
        page = made / re.sub(r"README\.md$", "index.md", name).replace(".md", ".html")
        text = page.read_text()
        assert "run_step" in text or name != "api.md"
        assert [match["url"] for match in FETCHED.finditer(text) if "canonical" not in match[0]] == [], name


def test_docs_site_navigation_lists_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w./-]+\.md", yaml.dump(yaml.safe_load(text)["nav"]))
    assert sorted(listed) == sorted({*listed})
    assert {*names(ROOT / "docs")} == {*listed} - {"CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"}


def links(page: Path) -> set[str]:
    """Return the files of the repository that a page links to."""
    folder = page.parent.relative_to(ROOT).as_posix()
    return {posixpath.normpath(posixpath.join(folder, target)) for target in LINK.findall(page.read_text())}


def test_docs_pages_are_all_reachable_from_readme() -> None:
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.endswith(".md") and (ROOT / page).is_file():
            reached.add(page)
            todo += sorted(links(ROOT / page))
    assert sorted({f"docs/{name}" for name in names(ROOT / "docs")} - reached) == []


@pytest.mark.parametrize(
    "page", [*pages(), *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
)
def test_docs_page_links_and_paths_exist(page: Path) -> None:
    assert not [target for target in sorted(links(page)) if not (ROOT / target).exists()]
    assert not [path for path in PATHS.findall(page.read_text()) if not (ROOT / path).exists()]


@pytest.mark.parametrize("topic", TOPICS)
def test_docs_topic_page_ends_with_its_limits(topic: str) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / f"{topic}.md").read_text(), re.M)
    assert headings[-1] == "Limits"
