"""The tree that design and README show, held to: who imports whom, that everything imports, and that the README names what is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/limner"
ORDER = ["pool", "scorers", "feedback", "examples", "training", "guidance", "evaluation", "figures"]
ABOVE_ALL = ["cli", "steps", "estimate"]  # these know every folder, and only they import each other
FILES = sorted(SOURCE.rglob("*.py"))
FOREIGN = ("torchvision", "open_clip", "timm")


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from limner import seeds` is limner.seeds."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            module = node.module or ""
            nested = [a.name for a in node.names if (SOURCE.parent / Path(*module.split("."), a.name)).with_suffix(".py").exists()]
            nested += [a.name for a in node.names if (SOURCE.parent / Path(*module.split("."), a.name)).is_dir()]
            found |= {f"{module}.{n}" for n in nested} or {module}
    return found


def allowed(part: str, other: str) -> bool:
    """Whether a file of the folder or top-level module `part` may import from `other`."""
    if part in ABOVE_ALL or part == other:
        return True
    if other in ABOVE_ALL:
        return False
    if other in ORDER:
        return part in ORDER and ORDER.index(other) < ORDER.index(part) and other != "figures"
    if other == "models":
        return part in ORDER
    return True  # a top-level module


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_import_rule(file: Path) -> None:
    """A folder imports top-level modules, models, and folders above it in design.md's list; nothing but cli and steps imports figures."""
    part = name_of(file).split(".")[1] if "." in name_of(file) else "limner"
    own = {m.split(".")[1] for m in imports(file) if m.startswith("limner.")}
    assert [o for o in sorted(own) if not allowed(part, o)] == []
    assert [m for m in imports(file) if m.split(".")[0] in FOREIGN] == []


def test_the_rule_itself() -> None:
    assert allowed("training", "pool")
    assert allowed("pool", "models")
    assert allowed("pool", "store")
    assert allowed("steps", "figures")
    assert not allowed("pool", "training")
    assert not allowed("scorers", "cli")
    assert not allowed("models", "pool")
    assert not allowed("store", "models")
    assert not allowed("evaluation", "figures")


def test_every_folder_has_its_place() -> None:
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert folders <= {*ORDER, "models", "steps"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_module_imports(file: Path) -> None:
    name = name_of(file)
    if name.startswith("limner.figures") and importlib.util.find_spec("anny") is None:
        pytest.skip("needs the extra `figures`")
    importlib.import_module(name)


def readme_tree() -> list[tuple[str, str]]:
    """(path, description) of each line of the README's fenced tree; indentation by two spaces a level, folders end with /."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    trees = [b for b in blocks if re.search(r"^src/limner/", b, re.MULTILINE)]
    if not trees:
        return []
    found, above = [], list[str]()
    for line in trees[0].splitlines():
        match = re.match(r"( *)(\S+)(?:\s+(.*))?$", line)
        if match:
            indent, name, text = match.groups()
            above = [*above[: len(indent) // 2], name]
            found.append(("".join(above), text or ""))
    return found


def test_the_readme_tree_is_the_disk() -> None:
    """Every path of it exists and says what it is; every folder and top-level module of src/limner is in it."""
    tree = readme_tree()
    assert tree, "README.md has no fenced tree with a line `src/limner/`"
    paths = dict(tree)
    assert [p for p in paths if not (ROOT / p).exists()] == []
    assert [p for p, text in tree if not text and p != "src/limner/"] == []
    there = {f"src/limner/{p.name}/" for p in SOURCE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    there |= {f"src/limner/{p.name}" for p in SOURCE.glob("*.py") if p.name != "__init__.py"}
    assert sorted(there - paths.keys()) == []
