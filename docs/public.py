"""What dbojax makes public, read from its source, and the page of each module.

A module is public if an ``__init__`` gives it away by ``from a import b as b``. Its
names are those that it gives away so, and what it defines itself without underscore.
Standard library and the package alone: `tests/test_docs.py` reads this as well.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = "dbojax"
CONTRACTS = {"base", "trees"}  # their names live with those who give them away


class Name(NamedTuple):
    """One public path of an object."""

    path: str  # dbojax.compressors.top_k
    kind: str  # function, class, data or module
    value: Any


def names_of(module: ModuleType) -> list[Name]:
    """The public names of a module, in the order of the alphabet."""
    found = {
        name: Name(f"{module.__name__}.{name}", _kind(value), value)
        for name in _written(ast.parse(inspect.getsource(module)))
        if not name.startswith("_")
        for value in [getattr(module, name)]
    }
    return [found[name] for name in sorted(found)]


def modules() -> dict[str, list[Name]]:
    """All public modules with their names."""
    found, queue = {}, [importlib.import_module(ROOT)]
    while queue:
        module = queue.pop(0)
        if module.__name__ not in found:
            found[module.__name__] = names_of(module)
            queue += [n.value for n in found[module.__name__] if n.kind == "module"]
    return found


def homes(found: dict[str, list[Name]]) -> dict[str, str]:
    """Where each public path, and each path of a definition, is described."""
    best, paths = {}, {}
    names = [name for module in found.values() for name in module]
    for name in sorted(names, key=lambda name: _distance(name.path)):
        identity = name.path if name.kind == "data" else id(name.value)
        paths[name.path] = best.setdefault(identity, _own(name))
    for name in names:
        if name.kind in ("function", "class"):
            defined = f"{name.value.__module__}.{name.value.__qualname__}"
            paths.setdefault(defined, paths[name.path])
    return paths


def page(module: str, names: list[Name], home: dict[str, str]) -> str:
    """The text of one page: the module, its names in a table, each in full."""
    lines = [module, "=" * len(module), "", f".. automodule:: {module}", ""]
    lines += [".. autosummary::", "   :nosignatures:", ""]
    for name in (n for n in names if n.kind != "data"):
        shown = home[name.path].removeprefix(f"{module}.")
        lines += [f"   {shown if shown != home[name.path] else f'~{shown}'}"]
    for name in (n for n in names if n.kind != "module" and home[n.path] == n.path):
        lines += ["", f".. auto{name.kind}:: {name.path}"]
        if name.kind == "class":
            lines += ["   :members:"]
        if name.kind == "data":
            lines[-1:] = _data(module, name.path.rpartition(".")[2])
    for name, where in sorted(_types_in(names).items()):
        if not {f"{where}.{name}", f"{module}.{name}"} & home.keys():
            lines += ["", *_data(where, name)]
    return "\n".join(lines) + "\n"


def write(folder: Path) -> dict[str, str]:
    """Write all pages, touching only those that changed; return `homes`."""
    found = modules()
    home = homes(found)
    folder.mkdir(exist_ok=True)
    for old in set(folder.glob("*.rst")) - {folder / f"{m}.rst" for m in found}:
        old.unlink()
    for module, names in found.items():
        path, text = folder / f"{module}.rst", page(module, names, home)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
    return home


@functools.cache
def types() -> dict[tuple[str, str], str]:
    """Where each name of a type, as ``Step = float | jax.Array``, is defined.

    Keys are the package and the name, for a name may mean two things in two of them.
    """
    top = Path(importlib.import_module(ROOT).__file__).parents[1]
    return {
        (path.parent.name, name): ".".join(path.relative_to(top).with_suffix("").parts)
        for path in (top / ROOT).rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call)
        for name in _targets(node)
        if re.match("[A-Z][a-z]", name)
    }


def comments(source: str) -> dict[str, str]:
    """The remark on each ``name: type`` or ``name = value`` of a source text.

    It stands behind, or on the lines above.
    """
    found: dict[str, str] = {}
    name, above = None, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = re.sub(r"[|*]|_(?!\w)", r"\\\g<0>", token.string.lstrip("#: "))
            if name:
                found[name] = text
            else:
                above = f"{above} {text}".strip()
        elif token.type == tokenize.NAME and not name:
            name = token.string
            found |= {name: above} if above else {}
            above = ""
        elif token.type == tokenize.NEWLINE:
            name = None
        elif token.type == tokenize.NL and not token.line.strip():
            above = ""
    return found


def _types_in(names):
    """The names of types in the signatures of a page, where their package has them."""
    known, found = types(), {}
    for value in (n.value for n in names if n.kind in ("function", "class")):
        package = value.__module__.split(".")[-2]
        text = " ".join(map(str, inspect.get_annotations(value).values()))
        for word in re.findall(r"\w+", text):
            if (package, word) in known:
                found[word] = known[package, word]
    return found


def _data(module, name):
    """A constant, an instance or a name of a type, with its remark."""
    source = inspect.getsource(importlib.import_module(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and name in (a.name for a in node.names):
            return _data(node.module, name)
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
            value = ast.unparse(node.value)
            shown = len(value) < 80 and "lambda" not in value
            lines = [f".. py:data:: {name}", f"   :value: {value}"][: 1 + shown]
            return [*lines, "", f"   {comments(source).get(name, '')}"]
    raise LookupError(f"{module} does not define {name}.")


def _targets(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _written(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if a.name == a.asname)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _targets(node)


def _kind(value):
    if inspect.ismodule(value):
        return "module"
    if not getattr(value, "__module__", "").startswith(ROOT):
        return "data"
    if inspect.isfunction(value):
        return "function"
    return "class" if inspect.isclass(value) else "data"


def _own(name):
    return name.value.__name__ if name.kind == "module" else name.path


def _distance(path):
    parts = path.split(".")
    return len(parts), parts[1] in CONTRACTS, path
