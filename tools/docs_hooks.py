"""What the documentation site (mkdocs.yml) gets at build time: pages made from the code, and links that stay inside.

Pages that lie in docs/ are also read in the repository, where `../examples` is a link; in the site it is only a name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the command line and from the OpenAPI document."""
    from tools.docs_pages import command_line, http_reference

    for name, text in (("cli.md", command_line()), ("http-reference.md", http_reference())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become the names of what they point to."""
    return OUTSIDE.sub(lambda found: named(found[1], found[2]), markdown)


def named(text: str, target: str) -> str:
    """A link's text with the file that it points to, said once."""
    plain = text.strip("`")
    return f"`{target}`" if plain in (target, target.rsplit("/", 1)[-1]) else f"{text} (`{target}`)"
