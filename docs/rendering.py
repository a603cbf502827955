"""What Sphinx needs to show the docstrings of dbojax: links and fields."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import public
from docutils import nodes
from sphinx.addnodes import pending_xref as LINK
from sphinx.errors import SphinxError

FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//[^\"]*\""
    r"|<link[^>]*\shref=\"(?:https?:)?//[^\"]*\""
    r"|@import[^;]*//[^;]*|url\(\s*[\"']?(?:https?:)?//[^)]*"
)


def write_pages(app):
    """One page a module, before anything is read."""
    app.env.homes = public.write(Path(app.srcdir) / "reference")


def add_fields(app, what, name, obj, options, lines):
    """The fields of a NamedTuple or dataclass, with the comments in its source."""
    fields = getattr(obj, "__annotations__", None)
    if what != "class" or not fields or any(line == "Args:" for line in lines):
        return
    remarks = public.comments(inspect.cleandoc(inspect.getsource(obj)))
    told = [f"    {field}: {remarks[field]}" for field in fields if field in remarks]
    lines += ["", "Fields:", *told] if told else []


def name_types(app, what, name, obj, options, signature, returned):
    """Names of types by their names alone, in unions as well."""
    wrapped = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")
    return tuple(text and wrapped.sub(r"\1", text) for text in (signature, returned))


def skip_fields(app, what, name, obj, skip, options):
    """Fields stand in the text of their class."""
    return True if type(obj).__name__ in ("_tuplegetter", "member_descriptor") else None


def link_literals(app, doctree):
    """Make a link of each ``dbo.part.name`` in the text, with or without arguments."""
    for literal in list(doctree.findall(nodes.literal)):
        path = re.match(r"dbo(?:jax)?((?:\.\w+)+)", literal.astext())
        home = app.env.homes.get(f"{public.ROOT}{path[1]}") if path else None
        if home and not isinstance(literal.parent, nodes.reference | LINK):
            link = LINK(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=home,
                refexplicit=True,
                refdoc=app.env.current_document.docname,
            )
            literal.replace_self(link)


def resolve(app, env, node, contnode):
    """Links by ``dbo.``, by the path of a definition, or from a sibling's page."""
    if node.get("refdomain") != "py":
        return None
    target = re.sub(r"^dbo\.", f"{public.ROOT}.", node["reftarget"])
    home = env.homes.get(target) or _sibling(env, node, target)
    if home is None:  # types of others, and words in single backticks, are no links
        role = node["reftype"] != "obj" and isinstance(contnode, nodes.literal)
        ours = target.startswith(public.ROOT) or "." not in target
        return None if role and ours else contnode
    node["reftarget"] = home
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", home, node, contnode
    )


def _sibling(env, node, target):
    """A name beside the definition of the object whose text this is."""
    shown = ".".join(filter(None, (node.get("py:module"), node.get("py:class"))))
    beside = {home for path, home in env.homes.items() if path.endswith(f".{target}")}
    near = {home for home in beside if home.startswith(shown)}
    return next(iter(near or beside)) if len(near or beside) == 1 else None


def check(app, error):
    """Refuse a site that lacks a public name or fetches anything."""
    if error or app.builder.name != "html":
        return
    shown = {entry[0] for entry in app.env.get_domain("py").get_objects()}
    missing = sorted(set(app.env.homes.values()) - shown)
    fetched = [
        f"{path.relative_to(app.outdir)}: {found[0]}"
        for pattern in ("*.html", "*.css")
        for path in Path(app.outdir).rglob(pattern)
        for found in FETCHED.finditer(path.read_text("utf-8"))
    ]
    if missing or fetched:
        raise SphinxError("\n".join(["The site is not whole:", *missing, *fetched]))


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", add_fields, priority=400)
    app.connect("autodoc-process-signature", name_types)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", link_literals)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
