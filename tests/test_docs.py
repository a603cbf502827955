"""The reference site leaves out nothing public; `make docs` itself refuses the rest."""

import importlib
import inspect
import types
from pathlib import Path

import pytest

import dbojax

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def public(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("public")


def packages(module=dbojax):
    """What `dbojax` gives away, walked as Python sees it."""
    yield module
    modules = [v for v in vars(module).values() if isinstance(v, types.ModuleType)]
    for value in modules:
        inside = value.__name__.startswith(f"{module.__name__}.")
        if inside and hasattr(value, "__path__"):
            yield from packages(value)


def test_every_public_name_has_a_place(public, tmp_path):
    home = public.write(tmp_path)
    pages = {page.stem: page.read_text() for page in tmp_path.glob("*.rst")}
    for module in packages():
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("dbojax")
            if ours and not name.startswith("_") and callable(value):
                path = home[f"{module.__name__}.{name}"]
                page = pages[path.rpartition(".")[0]]
                kind = "class" if inspect.isclass(value) else "function"
                assert f".. auto{kind}:: {path}\n" in page


def test_the_index_leads_to_every_page(public):
    index = (DOCS / "index.rst").read_text().split()
    for module in public.modules():
        assert module in index
        assert f"reference/{module}" in index


def test_remarks_are_found_behind_and_above(public):
    source = """
class Part(NamedTuple):
    a: int  # behind
    # above b,
    # on two lines
    b: tuple[int, int] = (0, 0)
    c: int

x = 3  # E|v|^2, z_
"""
    assert public.comments(source) == {
        "a": "behind",
        "b": "above b, on two lines",
        "x": r"E\|v\|^2, z\_",
    }
