"""The pages: no dead links, and a site that holds all of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.support import script_module

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    return script_module(ROOT / "scripts" / "docs_links.py")


def test_no_link_is_dead(pages: ModuleType) -> None:
    assert pages.dead_links() == []


def test_dead_links_are_found(pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for name in pages.TOP:
        (tmp_path / name).write_text("# A title, here\n[ok](docs/a.md#part-b) [web](https://x.y) `[code](nowhere)`\n")
    text = "## Part B\n## With `--flag`\n[up](../README.md#a-title-here) [no](b.md) [no](#part-c) [one](#with---flag)\n"
    (tmp_path / "docs" / "a.md").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.dead_links() == [
        "docs/a.md: b.md: no such file",
        f"docs/a.md: #part-c: {pages.UNNAMED}",
        f"docs/a.md: #with---flag: {pages.UNNAMED}",
    ]


def test_the_site_has_every_page_and_its_links_fit(pages: ModuleType, tmp_path: Path) -> None:
    pages.stage(tmp_path / "site")
    names = {path.name for path in (tmp_path / "site").glob("*.md")}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    entries = [entry for section in nav for entry in section.values()]
    listed = [page for entry in entries for page in ([entry] if isinstance(entry, str) else entry)]
    assert sorted(listed) == sorted(names)
    assert "`--verify none|structure|logits`" in (tmp_path / "site" / "index.md").read_text("utf-8")
    for path in (tmp_path / "site").glob("*.md"):
        for link in pages.links(path.read_text("utf-8")):
            name = link.partition("#")[0]
            assert link.startswith(("http", "#")) or (path.parent / name).exists(), f"{path.name}: {link}"
