#!/usr/bin/env python3
"""Check that no link in README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ is dead; lay the pages out as a site.

    python scripts/docs_links.py                      # exit 1 and a line for each link that leads nowhere
    python scripts/docs_links.py --stage build/docs   # pages where mkdocs reads them, links turned to fit

Links to files and to headings are followed; addresses on the web are not asked for.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
UNNAMED = "no such heading, or not by that name in both GitHub and mkdocs"
ROW = re.compile(r"^\|.*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Every page."""
    return [ROOT / name for name in TOP] + sorted((ROOT / "docs").glob("*.md"))


def links(text: str) -> Iterator[str]:
    """The targets of a page's links, those in code left out."""
    yield from LINK.findall(re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, without those that GitHub and mkdocs make differently."""
    titles = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles]
    return {title.replace(" ", "-") for title in plain} & {re.sub(r"[- ]+", "-", title) for title in plain}


def dead_links() -> list[str]:
    """A line for every link that leads nowhere."""
    dead = []
    for page in pages():
        for link in links(page.read_text(encoding="utf-8")):
            if link.startswith(("https://", "http://", "mailto:")):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists():
                dead.append(f"{page.relative_to(ROOT)}: {link}: no such file")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
                dead.append(f"{page.relative_to(ROOT)}: {link}: {UNNAMED}")
    return dead


def bare_code(row: re.Match[str]) -> str:
    """A table's row whose code has bare bars: GitHub needs them marked, mkdocs shows the mark."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0])


def stage(folder: Path, repository: str = "https://github.com/gqa-convert/gqa-convert/blob/main/") -> None:
    """Lay the pages out in one folder; links to what is no page lead to the repository."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    known = {ROOT / name: new for name, new in TOP.items()}
    known |= {path.resolve(): str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*")}
    for page in pages():

        def turned(match: re.Match[str], page: Path = page) -> str:
            link = match[1]
            name, mark, anchor = link.partition("#")
            target = (page.parent / name).resolve()
            if not name or "://" in link or not target.exists():
                return match[0]
            if target in known:
                return f"]({known[target]}{mark}{anchor})"
            return f"]({repository}{target.relative_to(ROOT)}{mark}{anchor})"

        text = LINK.sub(turned, page.read_text(encoding="utf-8"))
        text = ROW.sub(bare_code, text)
        (folder / known[page.resolve()]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        stage(Path(sys.argv[2]))
    elif dead := dead_links():
        sys.exit("\n".join(dead))
