"""For mkdocs: pages and pictures that lie outside docs/ join the site, and links to them lead there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: What joins, as patterns from the root of the repository.
JOINING = ("CONTRIBUTING.md", "results/*/README.md", "results/**/*.png")


def on_files(files: Any, config: Any) -> Any:
    """All files of the site, those of `JOINING` under their own paths."""
    from mkdocs.structure.files import File

    for pattern in JOINING:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page of docs/ links to ``../results``, one beside it to ``docs/``, as on GitHub; in the site both are one."""
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}").replace("](docs/", f"]({up}")
