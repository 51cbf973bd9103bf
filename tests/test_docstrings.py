"""The API reference (make docs) is made of docstrings: nothing public is without one. Nothing is imported for it."""

import ast
from collections.abc import Iterator

from conftest import ROOT


def missing(tree: ast.AST, name: str) -> Iterator[str]:
    """Names of the public definitions in a module or class, and of itself, that have no docstring."""
    if not ast.get_docstring(tree):
        yield name
    for child in tree.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            if not ast.get_docstring(child):
                yield f"{name}.{child.name}"
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from missing(child, f"{name}.{child.name}")


def test_everything_public_has_a_docstring():
    files = sorted((ROOT / "bhpeft").rglob("*.py"))
    assert len(files) > 50
    found = [name for file in files
             for name in missing(ast.parse(file.read_text(encoding="utf-8")), str(file.relative_to(ROOT)))]  # fmt: skip
    assert not found, "\n".join(["without a docstring:", *found])


def test_what_is_missing_is_found():
    text = 'def a(): pass\ndef _b(): pass\nclass C:\n    """c"""\n    def d(self): pass\n    def __init__(self): pass\n'
    assert list(missing(ast.parse(text), "m")) == ["m", "m.a", "m.C.d"]
