"""`make docs`: lays the checkout's Markdown and what it links to into build/docs, of which zensical makes the site.

The pages stay where they are, readable without a site. A link to a folder goes to its README.md; where it has none, the
words stay without a link.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import method_pages  # noqa: E402  beside this file
import recipe_pages  # noqa: E402

ROOT = HERE.parents[1]
BUILD = ROOT / "build"
STAGED = BUILD / "docs"
PLUGINS = ("plugins/fairseq_sigma", "plugins/timm_stable", "plugins/hf_stable")
PACKAGES = ("stable_core", "stable_monitor", *PLUGINS, "nanogpt_patch")
PAGES = (
    "*.md",
    "docs/*.md",
    "docs/notebooks/*.py",
    "recipes/README.md",
    "recipes/*/README.md",
    "*/results/*.md",
    "recipes/*/results/*.md",
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?!\w+:|#)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def pages() -> Iterator[Path]:
    """What becomes a page, from the root: Markdown, and notebooks."""
    for pattern in PAGES:
        yield from (path.relative_to(ROOT) for path in sorted(ROOT.glob(pattern)))


def markdown_of(notebook: str) -> str:
    """A notebook in jupytext's percent format, as Markdown."""
    parts = []
    for cell in re.split(r"^# %%", notebook, flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        is_text = "[markdown]" in kind
        parts.append(re.sub(r"^# ?", "", text, flags=re.MULTILINE) if is_text else f"```python\n{text.strip()}\n```\n")
    return "\n".join(parts)


def stage(page: Path) -> None:
    """Copies a page and the files it links to; links that go nowhere are an error."""
    notebooks = {other for other in pages() if other.suffix == ".py"}

    def placed(link: re.Match) -> str:
        target = (ROOT / page.parent / link["path"]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page}: {link['path']} is linked, and is not there")
        if target.is_dir():
            if not (target / "README.md").is_file():
                return link["text"]
            return f"[{link['text']}]({link['path'].rstrip('/')}/README.md{link['anchor'] or ''})"
        if target.relative_to(ROOT) in notebooks:
            return link[0].replace(".py", ".md")
        if target.suffix != ".md":
            copy = STAGED / target.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
        return link[0]

    text = (ROOT / page).read_text(encoding="utf-8")
    staged = (STAGED / page).with_suffix(".md")
    staged.parent.mkdir(parents=True, exist_ok=True)
    text = LINK.sub(placed, markdown_of(text) if page.suffix == ".py" else text)
    if page.match("recipes/*/README.md"):
        text += recipe_pages.scripts(ROOT / page.parent)
    staged.write_text(text, encoding="utf-8")


def api(package: Path) -> str:
    """The page of a package: what it exports, each from where it is defined, or else all of its modules."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {
        alias.name: f"{package.name}.{node.module}" if node.level else node.module
        for node in imports
        for alias in node.names
    }
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    page = f"# {package.name}\n\n::: {package.name}\n    options:\n      show_root_heading: false\n"
    if not exported:
        return page + "      show_submodules: true\n"
    page += "      members: false\n"
    names = sorted(set(exported[0]) & set(modules), key=str.lower)
    return page + "".join(f"\n::: {modules[name]}.{name}\n" for name in names)


def main() -> None:
    shutil.rmtree(STAGED, ignore_errors=True)
    for page in pages():
        stage(page)
    (STAGED / "docs" / "site").mkdir()
    shutil.copy(HERE / "style.css", STAGED / "docs" / "site")
    shutil.copy(HERE / "mkdocs.yml", BUILD)
    (STAGED / "methods").mkdir()
    for name, method in method_pages.METHODS.items():
        (STAGED / "methods" / f"{name}.md").write_text(method_pages.page(method), encoding="utf-8")
    (STAGED / "api").mkdir()
    for package in PACKAGES:
        (STAGED / "api" / f"{Path(package).name}.md").write_text(api(ROOT / package), encoding="utf-8")


if __name__ == "__main__":
    main()
