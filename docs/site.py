"""Hooks of MkDocs: the site brings its own Mermaid, so diagrams need no other server."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

MERMAID = "assets/mermaid.js"


def on_files(pages: Files, config: MkDocsConfig) -> Files:
    """Add Mermaid, which the package mermaidx has in it, to the site's files."""
    source = str(files("mermaidx").joinpath("assets/mermaid.js"))
    pages.append(File.generated(config, MERMAID, abs_src_path=source))
    return pages


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001
    """Load Mermaid, 3.5 MB, on the pages that have a diagram."""
    if 'class="mermaid"' not in output:
        return output
    script = f'<script src="{get_relative_url(MERMAID, page.url)}"></script>'
    return output.replace("</head>", f"{script}</head>", 1)
