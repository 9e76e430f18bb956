"""Draws the packages of grpo_trl and their imports as a Mermaid graph into docs/code_map.md.

python docs/draw_code_map.py
"""

import ast
from pathlib import Path


PAGE = Path(__file__).parent / "code_map.md"
PACKAGE = Path(__file__).parents[1] / "src" / "grpo_trl"
GROUND = {"errors", "seeds", "logging", "types", "metrics", "model_utils", "free_memory", "cpu_kernels", "gpu_kernels"}
"""Imported nearly everywhere, so that their arrows would hide the others."""


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_packages(path: Path) -> set[str]:
    """Packages and modules of grpo_trl that a file imports by relative imports."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
            names = [name for name in base if name] or [alias.name for alias in node.names]
            found.add(names[0])
    return found


def arrows() -> set[tuple[str, str]]:
    """Pairs of packages, the first of which imports the second."""
    pairs = {(package_of(path), other) for path in PACKAGE.rglob("*.py") for other in imported_packages(path)}
    return {(a, b) for a, b in pairs if a != b and "__init__" not in (a, b) and not {a, b} & GROUND}


def graph() -> str:
    """The packages in Mermaid, which GitHub renders."""
    lines = [f"    {a} --> {b}" for a, b in sorted(arrows())]
    ground = f"    ground[{', '.join(sorted(GROUND))}]"
    return "\n".join(["```mermaid", "flowchart TD", *lines, ground, "```"])


if __name__ == "__main__":
    before, rest = PAGE.read_text().split("<!-- packages -->")
    after = rest.split("<!-- /packages -->")[1]
    PAGE.write_text(f"{before}<!-- packages -->\n{graph()}\n<!-- /packages -->{after}")
