"""Backbones: any width, and the same numbers with units left out or silenced."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import dbojax as dbo
from dbojax.tasks import data, representations

SIDE, CLASSES = 5, 3
BACKBONES = {
    "dense": representations.dense(SIDE**2, (6, 4)),
    "one layer": representations.dense(SIDE**2, (5,)),
    "convolutional": representations.convolutional(SIDE**2, (3, 4)),
    "colour": representations.convolutional(SIDE**2 * 2, (3,), channels=2),
}
KEPT = {"h0": np.array([2, 0]), "h1": np.array([1, 3, 2])}


def inputs_of(backbone, count=4):
    d = SIDE**2 * (2 if backbone is BACKBONES["colour"] else 1)
    return jax.random.normal(jax.random.key(1), (count, d))


@functools.cache
def start(name):
    """Parameters and a head, none of them zero."""
    return jax.jit(functools.partial(drawn_start, BACKBONES[name]))()


def drawn_start(backbone):
    x = backbone.init(jax.random.key(0))
    width = backbone.features(x, inputs_of(backbone)).shape[-1]
    y = {"kernel": jnp.zeros((width, CLASSES)), "bias": jnp.zeros(CLASSES)}
    keys = iter(jax.random.split(jax.random.key(2), 99))
    x, y = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), (x, y)
    )
    return x, y


def units_of(labels, tree):
    """Group -> units; an axis may hold each unit several times."""
    sizes = {}
    for names, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
        for name, length in zip(names.split(), leaf.shape, strict=True):
            sizes[name] = math.gcd(sizes.get(name, 0), length)
    return sizes


def chosen(names, shape, sizes):
    """Which entries of each axis stay, units fastest."""
    for name, length in zip(names.split(), shape, strict=True):
        if name == "_":
            yield np.arange(length)
        else:
            copies = np.arange(length // sizes[name])[:, None]
            yield (copies * sizes[name] + KEPT[name][None]).reshape(-1)


def extracted(labels, tree, sizes):
    def take(names, leaf):
        return np.asarray(leaf)[np.ix_(*chosen(names, leaf.shape, sizes))]

    return jax.tree.map(take, labels, tree)


def masked(labels, tree, sizes):
    def silence(names, leaf):
        kept = np.zeros(leaf.shape)
        kept[np.ix_(*chosen(names, leaf.shape, sizes))] = 1
        return np.asarray(leaf) * kept

    return jax.tree.map(silence, labels, tree)


def logits(backbone, x, y, inputs):
    return backbone.features(x, inputs) @ y["kernel"] + y["bias"][None]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_smaller_network_is_the_whole_one_with_silent_units(name):
    backbone = BACKBONES[name]
    x, y = start(name)
    labels, inputs = (backbone.x, backbone.y), inputs_of(backbone)
    sizes = units_of(labels, (x, y))
    assert set(sizes) - {"_"} == {f"h{layer}" for layer in range(len(x))}

    def loss(xy):
        return jnp.sum(jnp.sin(logits(backbone, *xy, inputs)))

    value = jax.jit(jax.value_and_grad(loss))
    small = value(extracted(labels, (x, y), sizes))
    wide = value(masked(labels, (x, y), sizes))
    np.testing.assert_allclose(small[0], wide[0], rtol=1e-12)
    assert not np.isclose(small[0], value((x, y))[0]), "the units must matter"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        small[1],
        extracted(labels, wide[1], sizes),
    )


@pytest.mark.parametrize("name", ["dense", "convolutional"])
def test_a_representation_takes_a_backbone_and_is_the_written_objective(name):
    backbone = BACKBONES[name]
    inputs = inputs_of(backbone, 30)
    labels = np.arange(30) % CLASSES
    dataset = data.Dataset(np.asarray(inputs), labels, CLASSES, "noise")
    shards = data.distribute(dataset, n=2)
    task = dbo.tasks.hyper_representation(shards, backbone, ridge=0.4, seed=3)
    jax.tree.map(
        np.testing.assert_array_equal, task.x0, backbone.init(jax.random.key(3))
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(task.y0))
    x, y = start(name)
    one = jax.tree.map(lambda leaf: leaf[1], task.batch.lower)
    found = np.asarray(jax.jit(functools.partial(logits, backbone))(x, y, one.inputs))
    plain = np.mean(
        np.log(np.exp(found).sum(1)) - found[np.arange(len(found)), one.labels]
    )
    ridge = 0.2 * sum(float((leaf**2).sum()) for leaf in y.values())
    upper, lower = map(jax.jit, task.problem)
    np.testing.assert_allclose(upper(x, y, one), plain, rtol=1e-10)
    np.testing.assert_allclose(lower(x, y, one), plain + ridge, rtol=1e-10)


def test_a_norm_sees_one_channel_of_one_image():
    backbone = BACKBONES["convolutional"]
    x, _ = start("convolutional")
    inputs = inputs_of(backbone)
    features = jax.jit(backbone.features)
    alone = [features(x, row[None])[0] for row in np.asarray(inputs)]
    np.testing.assert_allclose(features(x, inputs), alone, rtol=1e-12)


def renamed(labels):
    return jax.tree.map(lambda label: label.replace("h", "layer"), labels)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_units_are_those_that_can_be_read_off(name):
    backbone = BACKBONES[name]
    x, y = start(name)

    def apply(x, y, inputs):
        return logits(backbone, x, y, inputs)

    found = dbo.submodels.layers(apply, x, y, inputs_of(backbone))
    assert (found.x, found.y) == (renamed(backbone.x), renamed(backbone.y))
    by_hand = dbo.submodels.layout(x, y, backbone.x, backbone.y)
    sizes = units_of((backbone.x, backbone.y), (x, y))
    assert by_hand.units == {n: size for n, size in sizes.items() if n != "_"}
    assert list(by_hand.units.values()) == list(found.units.values())


def flax_cnn(norm):
    parts = [linen.Conv(4, (3, 3)), norm, linen.relu, linen.Conv(3, (3, 3)), linen.relu]
    images = [lambda v: v.reshape(-1, SIDE, SIDE, 1)]
    flat = [lambda v: v.reshape(len(v), -1)]
    return linen.Sequential(images + [part for part in parts if part] + flat)


CNN = {
    "mlp": dbo.tasks.mlp((6, 4)),
    "cnn": flax_cnn(None),
    "cnn, a norm for each channel": flax_cnn(linen.GroupNorm(None, group_size=1)),
}


@pytest.mark.parametrize("name", CNN)
def test_the_units_of_flax_modules_can_be_read_off(name):
    backbone, inputs = CNN[name], jnp.linspace(0, 1, 2 * SIDE**2).reshape(2, -1)
    x = backbone.init(jax.random.key(0), inputs)["params"]
    width = backbone.apply({"params": x}, inputs).shape[-1]
    y = {"kernel": jnp.ones((width, CLASSES)), "bias": jnp.zeros(CLASSES)}

    def apply(x, y, inputs):
        return backbone.apply({"params": x}, inputs) @ y["kernel"] + y["bias"][None]

    found = dbo.submodels.layers(apply, x, y, inputs)
    lead = "" if name == "mlp" else "_ _ "
    first, *norms, second = found.x.values()
    assert first == {"kernel": f"{lead}_ layer0", "bias": "layer0"}
    assert second == {"kernel": f"{lead}layer0 layer1", "bias": "layer1"}
    assert norms == [{"scale": "layer0", "bias": "layer0"}] * ("norm" in name)
    assert found.y == {"kernel": "layer1 _", "bias": "_"}
    assert list(found.units.values()) == ([6, 4] if name == "mlp" else [4, 3])


def test_a_norm_over_several_channels_is_refused():
    backbone, inputs = flax_cnn(linen.LayerNorm()), jnp.ones((2, SIDE**2))
    x = backbone.init(jax.random.key(0), inputs)["params"]
    y = jnp.ones((3 * SIDE**2, CLASSES))

    def apply(x, y, inputs):
        return backbone.apply({"params": x}, inputs) @ y

    with pytest.raises(ValueError, match="norm over several units"):
        dbo.submodels.layers(apply, x, y, inputs)


MESSAGES = {
    "none": (lambda: representations.dense(4, ()), r"widths=\(\).*\(32,\)"),
    "no block": (lambda: representations.convolutional(4, ()), "at least one layer"),
    "widths": (lambda: representations.dense(4, (3, 0)), r"got \[4, 3, 0\]"),
    "square": (lambda: representations.convolutional(8, (2,)), "`convolutional`.*d=8"),
    "blocks": (lambda: representations.convolutional(36, (1, 1, 1)), "blocks=2 or"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    build, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        build()
