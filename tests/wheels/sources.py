"""The Python sources in a wheel, by `ast`: what a name is, and which parameters it takes. Imports nothing."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eplb_plugin.integration.common.seams import Seam


@dataclass(frozen=True)
class Found:
    """A definition in a module of the wheel; `node` is None for an attribute that only instances have."""

    module: str
    node: ast.AST | None


class Wheel:
    """An unpacked view of one wheel."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._names = frozenset(self._archive.namelist())
        self.version = path.name.split("-")[1]
        self.tree = cache(self._tree)

    def missing(self, seams: tuple[Seam, ...]) -> list[str]:
        """What the wheel lacks, one line for each name and argument."""
        lines = []
        for seam in seams:
            found = self.find(seam.target)
            if found is None:
                lines.append(f"{seam.target} is missing")
            elif seam.arguments or seam.exactly:
                lines += seam.wrong_arguments(self.parameters(found))
        return lines

    def find(self, target: str) -> Found | None:
        """The definition of a full name, through imports and base classes."""
        parts = target.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if self.tree(module) is not None:
                return self._within(module, parts[cut:])
        return None

    def parameters(self, found: Found) -> list[str]:
        """Names of parameters; of a class those of its constructor, or the fields of a dataclass."""
        node = found.node
        if isinstance(node, ast.ClassDef):
            made = self._member(Found(found.module, node), "__init__")
            if made is None:
                return [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
            node = made.node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return []
        given = node.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        extra = [item for item in (given.vararg, given.kwarg) if item is not None]
        return [item.arg for item in (*named, *extra)]

    def _file(self, module: str) -> tuple[str, bool] | None:
        """The file of a module, and whether it is a package."""
        base = module.replace(".", "/")
        for name, package in ((f"{base}/__init__.py", True), (f"{base}.py", False)):
            if name in self._names:
                return name, package
        return None

    def _tree(self, module: str) -> ast.Module | None:
        found = self._file(module)
        return None if found is None else ast.parse(self._archive.read(found[0]))

    def _within(self, module: str, parts: list[str]) -> Found | None:
        """The definition of `parts`, a dotted name, in a module."""
        found = self._top(module, parts[0])
        for part in parts[1:]:
            if found is None:
                return None
            found = self._member(found, part)
        return found

    def _top(self, module: str, name: str) -> Found | None:
        """A name of a module: defined there, or imported from a module of the wheel."""
        tree = self.tree(module)
        for node in () if tree is None else _statements(tree.body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return Found(module, node)
            if name in _assigned(node):
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                named = [item.name for item in node.names if (item.asname or item.name) == name]
                # From elsewhere: the name may be defined below, where an import failed.
                if named and (found := self._imported(module, node, named[0])) is not None:
                    return found
        return None

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Found | None:
        source = node.module or ""
        if node.level:
            found = self._file(module)
            above = module.split(".")
            above = above[: len(above) - node.level + (found is not None and found[1])]
            source = ".".join([*above, *([node.module] if node.module else [])])
        return self._top(source, name)

    def _member(self, owner: Found, name: str) -> Found | None:
        """A method, an attribute of the class or of its instances, in the class or its bases."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in owner.node.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return Found(owner.module, node)
            if name in _assigned(node):
                return Found(owner.module, node)
        for node in ast.walk(owner.node):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                return Found(owner.module, None)
        for base in owner.node.bases:
            above = self._within(owner.module, ast.unparse(base).partition("[")[0].split("."))
            if above is not None and (found := self._member(above, name)) is not None:
                return found
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under `if` and `try` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _assigned(node: ast.AST) -> set[str]:
    """Names that a statement assigns or annotates."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return set()
    return {item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)}
