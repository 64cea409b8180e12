"""Write README.md from index.ipynb, as its saved cells and outputs are: `make readme`. With --check: only say whether it is current."""

import json
import posixpath
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)]+)\)")  # to a file, relative to nbs/
DIRECTIVE = re.compile(r"^#\|\s*(.+?)\s*$", re.M)


def text(value: str | list[str]) -> str:
    "A notebook's text, which is a string or a list of lines."
    return value if isinstance(value, str) else "".join(value)


def shown(output: dict) -> str:
    "An output as Markdown: Markdown as it is, text as a block, a picture not at all."
    data = output.get("data", {})
    if "text/markdown" in data:
        return text(data["text/markdown"]).strip()
    if any(kind.startswith("image/") for kind in data):
        return ""
    said = text(output.get("text") or data.get("text/plain") or "").rstrip()
    return f"```text\n{said}\n```" if said else ""


def blocks(notebook: dict):
    "The pieces of the README in order."
    for cell in notebook["cells"]:
        source = text(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            yield source
        elif cell["cell_type"] == "code":
            directives = set(DIRECTIVE.findall(source))
            if directives & {"hide", "export"} or any(d.startswith("default_exp") for d in directives):
                continue
            if "echo: false" not in directives:
                code = DIRECTIVE.sub("", source).strip()
                yield f"```python\n{code}\n```" if code else ""
            yield from map(shown, cell["outputs"])


def readme() -> str:
    "The README that index.ipynb makes."
    notebook = json.loads((HERE / "index.ipynb").read_text(encoding="utf-8"))
    page = "\n\n".join(block for block in blocks(notebook) if block) + "\n"
    return LINK.sub(lambda link: f"]({posixpath.normpath(f'{HERE.name}/{link[1]}')})", page)


def main() -> int:
    path, made = HERE.parent / "README.md", readme()
    if path.exists() and path.read_text(encoding="utf-8") == made:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md is not what nbs/index.ipynb makes; make readme writes it.", file=sys.stderr)
        return 1
    path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
