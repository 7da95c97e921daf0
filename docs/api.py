"""A hook of mkdocs: makes the pages of the API reference, one for each module of the package."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = ("platform", "models", "sharding", "experiments")


def _pages() -> dict[str, dict[str, str]]:
    """Returns module name -> path of its page, for each package."""
    pages: dict[str, dict[str, str]] = {}
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            package = ".".join(("lamina", *file.relative_to(ROOT).parent.parts))
            pages.setdefault(package, {})[".".join(("lamina", *parts))] = "/".join(
                ("api", *parts, "index.md")
            )
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the reference to the navigation."""
    reference = [
        {package: [{m: p} for m, p in pages.items()]} for package, pages in _pages().items()
    ]
    config.nav = [*(config.nav or []), {"API reference": reference}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages themselves."""
    for pages in _pages().values():
        for module, path in pages.items():
            files.append(File.generated(config, path, content=f"# `{module}`\n\n::: {module}\n"))
    return files
