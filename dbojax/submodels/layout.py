"""Which axes of the variables count which units: what goes together when it is cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbojax.base import Tree
from dbojax.submodels.parts import WHOLE, masked, take


class Layout(NamedTuple):
    """Groups of units, and the group of every axis of x, y and a batch.

    Labels are trees of words, one per axis: ``"_ hidden"`` is a matrix whose columns
    are the units of the group ``hidden`` and whose rows are always whole.
    """

    units: dict[str, int]  # group -> how many units it has
    x: Tree  # labels, like x
    y: Tree  # labels, like y
    batch: Tree = None  # labels of one client's batch; None is all whole

    @property
    def lower_groups(self) -> tuple[str, ...]:
        """Groups that cut y."""
        words = {word for label in jax.tree.leaves(self.y) for word in label.split()}
        return tuple(name for name in self.units if name in words)


def layout(  # noqa: D417 - x and y, and their labels, are described together.
    x: Tree, y: Tree, x_units: Tree, y_units: Tree, batch_units: Tree = None
) -> Layout:
    r"""Say by hand which units the axes of x and y count.

    A dense layer :math:`h' = \sigma(h K + b)` with units ``in`` before and ``out``
    behind it has labels ``{"kernel": "in out", "bias": "out"}``: a unit's column, its
    bias and its row in the next kernel go together. An axis may be a multiple of the
    group, units fastest, e.g. the rows behind a flattened image with channels last.

    Args:
        x, y: one node's variables, or their shapes.
        x_units, y_units: trees of the same structures with one word per axis, ``"_"``
            for an axis that is always whole.
        batch_units: labels of one client's batch, where cutting a group shortens the
            data too; for sub-models that are truly smaller.

    Returns:
        A layout whose groups are numbered in the order of their first appearance.

    Raises:
        ValueError: if labels do not fit, nothing can be cut, or an axis is no multiple
            of its group.

    Examples:
        >>> x = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
        >>> both = layout(x, jnp.ones((8, 2)), {"kernel": "_ h", "bias": "h"}, "h _")
        >>> both.units, both.lower_groups
        ({'h': 4}, ('h',))

    References:
        Sub-models by channels: Diao, Ding and Tarokh (2021), arXiv:2010.01264.
    """
    lengths: dict[str, list[int]] = {}
    for name, tree, labels in (("x", x, x_units), ("y", y, y_units)):
        for word, length in _axes(name, tree, labels):
            lengths.setdefault(word, []).append(length)
    lengths.pop(WHOLE, None)
    if not lengths:
        raise ValueError(
            "Nothing can be cut: every axis of x and y is labelled '_'. Name the units "
            "that an axis counts, e.g. '_ hidden' for the columns of a kernel."
        )
    units = {word: min(found) for word, found in lengths.items()}
    for word, found in lengths.items():
        if any(length % units[word] or not length for length in found):
            raise ValueError(
                f"Axes of the group {word!r} must be multiples of its number of units, "
                f"the shortest of them; got lengths {found}."
            )
    words = [w for label in jax.tree.leaves(batch_units) for w in label.split()]
    unknown = sorted(set(words) - {WHOLE, *units})
    if unknown:
        raise ValueError(
            f"`batch_units` names groups that cut neither x nor y: {unknown}; there "
            f"are {list(units)}."
        )
    return Layout(units, x_units, y_units, batch_units)


def _axes(name, tree, labels) -> Iterator[tuple[str, int]]:
    wanted, got = jax.tree.structure(tree), jax.tree.structure(labels)
    if wanted != got:
        raise ValueError(
            f"`{name}_units` needs the structure of `{name}`, {wanted}, with one label "
            f"per leaf; got {got}."
        )
    pairs = zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True)
    for label, leaf in pairs:
        shape = jnp.shape(leaf)
        if not isinstance(label, str) or len(label.split()) != len(shape):
            raise ValueError(
                f"A leaf of `{name}` with shape {shape} needs a label of {len(shape)} "
                f"words, e.g. {' '.join([WHOLE] * len(shape))!r}; got {label!r}."
            )
        yield from zip(label.split(), shape, strict=True)


def coordinates(x: Tree, y: Tree) -> Layout:  # noqa: D417
    """Make every entry a unit of its own, for variables that are not networks.

    Args:
        x, y: one node's variables, whose leaves are vectors.

    Returns:
        A layout with a group for each leaf.

    Raises:
        ValueError: if a leaf is not a vector.

    Examples:
        >>> coordinates(jnp.ones(3), {"a": jnp.ones(2), "b": jnp.ones(5)}).units
        {'x0': 3, 'y0': 2, 'y1': 5}
    """

    def named(name, tree):
        leaves, structure = jax.tree.flatten(tree)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if any(len(shape) != 1 for shape in shapes):
            raise ValueError(
                f"`coordinates` cuts vectors; `{name}` has leaves of shapes {shapes}. "
                "Label the axes by hand with `dbo.submodels.layout`."
            )
        return structure.unflatten([f"{name}{i}" for i in range(len(leaves))])

    return layout(x, y, named("x", x), named("y", y))


def layers(  # noqa: D417
    apply: Callable[[Tree, Tree, Any], jax.Array], x: Tree, y: Tree, inputs: Any
) -> Layout:
    r"""Read off a feed-forward network which units go together.

    Kernels count in the order in which ``apply`` uses them: the last axis of each but
    the last is a group of its own, the axis before it the group of the kernel before.
    Biases go with the kernel beside them, norms with the kernel before them. The
    network's input and its outputs stay whole. What comes out is tried on random
    parameters: a unit that is cut must have no influence.

    Args:
        apply: ``(x, y, inputs) -> outputs``, e.g. logits: features by x, a head y.
        x, y: parameters or their shapes, as dictionaries or other trees; of flax
            variables the collection ``params`` alone.
        inputs: an example.

    Returns:
        A layout with groups ``layer0``, ``layer1``, ..., in the order of use.

    Raises:
        ValueError: if a parameter is not used, shapes do not fit a chain of layers, or
            units that are cut have an influence: skips, and norms over several units,
            whose statistics change with the width. Label those by hand.

    Examples:
        >>> def apply(x, y, inputs):
        ...     return jnp.tanh(inputs @ x["kernel"] + x["bias"][None]) @ y
        >>> x = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
        >>> found = layers(apply, x, jnp.ones((4, 2)), jnp.ones((5, 3)))
        >>> found.x, found.y
        ({'bias': 'layer0', 'kernel': '_ layer0'}, 'layer0 _')
    """
    for name, tree in (("x", x), ("y", y)):
        if isinstance(tree, dict) and "batch_stats" in tree:
            raise ValueError(
                f"`{name}` holds `batch_stats`: statistics over a batch make a finite "
                "difference see another function at each point, and change with the "
                "width. Use a norm per sample and channel, and pass "
                "`variables['params']`."
            )
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path((x, y)), strict=True)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    order = _order_of_use(apply, x, y, inputs, paths)
    kernels = [i for i in order if _is_kernel(shapes[i])]
    if len(kernels) < 2:
        raise ValueError(
            "A network needs at least two kernels, so that there are units between "
            f"them; found {len(kernels)} among shapes {shapes}."
        )
    labels, norms = _chain(paths, shapes, order, kernels)
    structure = jax.tree.structure((x, y))
    x_units, y_units = structure.unflatten(labels)
    found = layout(x, y, x_units, y_units)
    found = found._replace(
        units={f"layer{i}": found.units[f"layer{i}"] for i in range(len(kernels) - 1)}
    )
    _check_cut(apply, (x, y), inputs, found, structure.unflatten(norms))
    return found


def _is_kernel(shape) -> bool:
    return len(shape) > 1 and math.prod(shape[:-1]) > 1


def _order_of_use(apply, x, y, inputs, paths) -> list[int]:
    closed = jax.make_jaxpr(lambda both, inputs: apply(*both, inputs))((x, y), inputs)
    known = {var: i for i, var in enumerate(closed.jaxpr.invars[: len(paths)])}
    order = list(dict.fromkeys(_uses(closed.jaxpr, known)))
    unused = [jax.tree_util.keystr(p) for i, p in enumerate(paths) if i not in order]
    if unused:
        raise ValueError(
            f"`apply` does not use the parameters {unused} of (x, y), so their units "
            "cannot be read off. Label them by hand with `dbo.submodels.layout`."
        )
    return order


def _uses(jaxpr, known) -> Iterator[int]:
    for equation in jaxpr.eqns:
        taken = [v for v in equation.invars if not hasattr(v, "val")]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(equation.invars):
            # A call: its own order counts.
            pairs = zip(inner.invars, equation.invars, strict=True)
            passed = {
                a: known[b] for a, b in pairs if not hasattr(b, "val") and b in known
            }
            yield from _uses(inner, passed)
        yield from (known[v] for v in taken if v in known)


def _chain(paths, shapes, order, kernels) -> tuple[list[str], list[bool]]:
    """Labels of all leaves, and which of them belong to norms."""
    own = {i: f"layer{n}" for n, i in enumerate(kernels[:-1])} | {kernels[-1]: WHOLE}
    beside = {paths[i][:-1]: i for i in kernels}
    labels, norms = [""] * len(paths), [False] * len(paths)
    group, before = WHOLE, WHOLE
    for i in order:
        rank = len(shapes[i])
        if i in own:
            before, group = group, own[i]
            labels[i] = " ".join([WHOLE] * (rank - 2) + [before, group])
            continue
        # A bias may be read before its kernel.
        kernel = beside.get(paths[i][:-1]) if len(paths[i]) > 1 else None
        norms[i] = kernel is None
        last = group if kernel is None else own[kernel]
        labels[i] = " ".join([*[WHOLE] * (rank - 1), last][:rank])
    return labels, norms


def _check_cut(apply, both, inputs, found: Layout, norms):
    """Try on random parameters that units which are cut have no influence."""
    rng = np.random.default_rng(0)
    inputs = _varied(rng, inputs)
    both = jax.tree.map(
        lambda a: rng.normal(size=jnp.shape(a)).astype(jnp.result_type(a)), both
    )
    # Another half of each group: what skips over a kernel must not find its match.
    kept = {
        name: rng.permutation(size)[: -(-size // 2)]
        for name, size in found.units.items()
    }
    labels = (found.x, found.y)
    producers = jax.tree.map(_last_to_act(labels, norms), labels, norms)

    def smaller(both):
        return apply(*take(labels, found.units, both, kept), inputs)

    def outputs(both):
        cut, dead = (
            masked(part, found.units, kept, both) for part in (labels, producers)
        )
        return [apply(*cut, inputs), apply(*dead, inputs)]

    wanted, *others = jax.jit(outputs)(both)
    with contextlib.suppress(Exception):  # many networks know their widths
        others.append(jax.jit(smaller)(both))
    wanted, *others = map(np.asarray, (wanted, *others))
    close = 1e-3 * (1 + np.abs(wanted).max())
    _check_samples(apply, both, inputs, close)
    if not all(np.abs(out - wanted).max() <= close for out in others):
        raise ValueError(
            "This network is no chain of layers: units that were cut still have an "
            "influence, by a skip or a norm over several units. Use a norm per sample "
            "and channel, or label the axes by hand with `dbo.submodels.layout`."
        )


def _varied(rng, inputs):
    """Inputs whose samples differ, where they are numbers."""
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
        return inputs
    return inputs + rng.normal(size=jnp.shape(inputs)).astype(jnp.result_type(inputs))


def _check_samples(apply, both, inputs, close):
    """Refuse networks whose output for a sample depends on the others."""

    def outputs(both):
        return apply(*both, inputs)[:1], apply(*both, inputs[:1])

    if jnp.ndim(inputs) < 2 or len(inputs) < 2:
        return
    together, alone = map(np.asarray, jax.jit(outputs)(both))
    if not np.abs(together - alone).max() <= close:
        raise ValueError(
            "What this network makes of a sample depends on the rest of the batch, as "
            "with batch normalisation by statistics of the batch; these change with "
            "the units that are held. Use a norm per sample and channel."
        )


def _last_to_act(labels, norms) -> Callable[[str, bool], str]:
    """Labels of those leaves alone that see a unit last before the next kernel.

    A norm that sees each unit by itself makes all that comes before it harmless.
    """
    pairs = zip(jax.tree.leaves(labels), jax.tree.leaves(norms), strict=True)
    normed = {label.split()[-1] for label, is_norm in pairs if is_norm and label}

    def relabelled(label, is_norm):
        words = label.split()
        if not words:
            return ""
        last = words[-1] if is_norm or words[-1] not in normed else WHOLE
        return " ".join([WHOLE] * (len(words) - 1) + [last])

    return relabelled
