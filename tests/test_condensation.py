"""Condensation: losses and networks against loops, and what images are worth."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbojax as dbo
from dbojax.tasks import data, networks

SIDE, CLASSES = 4, 3


def toy(m, seed):
    """Pictures whose class is the bright row, in [0, 8] with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(m) % CLASSES
    images = rng.uniform(0, 3, size=(m, SIDE, SIDE))
    images[np.arange(m), labels] += 5
    return data.Dataset(images.reshape(m, -1), labels.astype(np.int32), CLASSES, "toy")


NETWORKS = {
    "perceptron": networks.perceptron(SIDE**2, CLASSES, (5, 4)),
    "conv_net": networks.conv_net(SIDE**2, CLASSES, width=2, blocks=2),
}


@pytest.fixture(scope="module")
def task():
    network = NETWORKS["conv_net"]
    return dbo.tasks.condensation(
        toy(31, 0), toy(20, 1), network, per_class=2, penalty=0.3, evaluation_steps=60
    )


def jittered(y, key):
    """Parameters none of which is at a special value, zeros of offsets among them."""
    leaves, structure = jax.tree.flatten(y)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def dense(layer, row):
    kernel, bias = (np.asarray(layer[name]) for name in ("kernel", "bias"))
    return np.array([row @ kernel[:, k] + bias[k] for k in range(len(bias))])


def written_perceptron(y, row):
    for layer in y[:-1]:
        row = np.maximum(dense(layer, row), 0)
    return dense(y[-1], row)


def written_block(layer, image):
    """Convolution, ReLU, instance norm and pooling, pixel by pixel."""
    height, width, channels = image.shape
    kernel = np.asarray(layer["conv"]["kernel"]).reshape(3, 3, channels, -1)
    scale, offset = (np.asarray(layer[k]).reshape(-1) for k in ("scale", "offset"))
    out = np.zeros((height, width, kernel.shape[-1])) + np.asarray(
        layer["conv"]["bias"]
    ).reshape(1, 1, -1)
    for r, c, i, j in np.ndindex(height, width, 3, 3):
        if 0 <= r + i - 1 < height and 0 <= c + j - 1 < width:
            out[r, c] += image[r + i - 1, c + j - 1] @ kernel[i, j]
    out = np.maximum(out, 0)
    pooled = np.zeros((height // 2, width // 2, out.shape[-1]))
    for k in range(out.shape[-1]):
        spread = np.sqrt(out[..., k].var() + 1e-5)
        normed = (out[..., k] - out[..., k].mean()) / spread * scale[k] + offset[k]
        for r, c in np.ndindex(height // 2, width // 2):
            pooled[r, c, k] = normed[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean()
    return pooled


def written_conv_net(y, row, side=SIDE):
    image = np.asarray(row).reshape(side, side, -1)
    for layer in y["blocks"]:
        image = written_block(layer, image)
    return dense(y["head"], image.reshape(-1))


WRITTEN = {"perceptron": written_perceptron, "conv_net": written_conv_net}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_the_written_ones(name, key):
    network = NETWORKS[name]
    y = jittered(network.init(key), key)
    inputs = jax.random.uniform(key, (3, SIDE**2))
    found = jax.jit(network.logits)(y, inputs)
    wanted = np.stack([WRITTEN[name](y, row) for row in np.asarray(inputs)])
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_pooling_leaves_an_odd_row_and_column_out(key):
    network = networks.conv_net(7 * 7 * 2, CLASSES, width=2, blocks=2, channels=2)
    y = jittered(network.init(key), key)
    row = jax.random.uniform(key, (1, 7 * 7 * 2))
    found = jax.jit(network.logits)(y, row)
    np.testing.assert_allclose(found[0], written_conv_net(y, row[0], 7), rtol=1e-10)


def test_instance_norm_forgets_the_scale_and_the_level_of_each_image(key):
    layer = {"scale": jnp.full((1, 1, 1, 2), 2.0), "offset": jnp.ones((1, 1, 1, 2))}
    images = jax.random.normal(key, (3, 4, 4, 2))
    each = jnp.array([1.0, 40.0, 7.0]).reshape(3, 1, 1, 1)
    found = networks.instance_norm(layer, images)
    np.testing.assert_allclose(found.mean((1, 2)), 1, rtol=1e-10)
    np.testing.assert_allclose(found.std((1, 2)), 2, rtol=1e-3)
    moved = networks.instance_norm(layer, each * images + 5 * each)
    np.testing.assert_allclose(moved, found, atol=1e-3)
    # A channel that is dead has no variance, and must not become infinite.
    still = jax.grad(lambda v: networks.instance_norm(layer, v).sum())(0 * images)
    assert jnp.isfinite(still).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_drawn_with_the_variance_of_their_inputs(name, key):
    many = jax.jit(jax.vmap(NETWORKS[name].init))(jax.random.split(key, 4000))
    for path, leaf in jax.tree.leaves_with_path(many):
        label = str(path[-1])
        if "kernel" in label:
            draws = np.asarray(leaf)
            wanted = 1 / draws.shape[1]
            # Of squares the standard error is at most sqrt(2 / n) of their mean.
            error = 5 * wanted * np.sqrt(2 / draws.size)
            assert abs((draws**2).mean() - wanted) < error
        else:
            np.testing.assert_array_equal(leaf, 1.0 if "scale" in label else 0.0)


def written_loss(rows, labels):
    """Mean cross-entropy of outputs, one by one."""
    each = [
        np.log(np.exp(row).sum()) - row[k] for row, k in zip(rows, labels, strict=True)
    ]
    return np.mean(each)


def test_both_objectives_are_the_written_ones(task, key):
    y, x = jittered(task.init(key), key), task.noise(key)
    labels = [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(task.labels, labels)
    outputs = [written_conv_net(y, row) for row in np.asarray(x)]
    squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(y))
    found = jax.jit(task.problem.lower)(x, y, ())
    wanted = written_loss(outputs, labels) + 0.3 * squares
    np.testing.assert_allclose(found, wanted, rtol=1e-10)

    given = toy(31, 0)
    scaled = given.inputs / given.inputs.max()
    outputs = [written_conv_net(y, row) for row in scaled]
    found = jax.jit(task.problem.upper)(x, y, task.batch.upper)
    np.testing.assert_allclose(found, written_loss(outputs, given.labels), rtol=1e-10)


def test_batches_pass_through_the_real_images(task, key):
    sampler = task.sampler(8)
    drawn = jax.jit(jax.vmap(sampler, (None, 0)))(key, jnp.arange(4)).upper
    assert drawn.mask.shape == (4, 8)
    np.testing.assert_array_equal(
        np.sort(np.asarray(drawn.inputs)[np.asarray(drawn.mask)], 0),
        np.sort(task.batch.upper.inputs, 0),
    )


def test_starts_lie_in_the_box_and_the_projection_is_the_nearest_point(task, key):
    x = task.noise(key)
    assert x.shape == (6, SIDE**2)
    np.testing.assert_array_equal(task.project(x), x)
    far = 5 * x - 2
    np.testing.assert_array_equal(task.project(far), np.minimum(np.maximum(far, 0), 1))
    images = np.asarray(task.images(key))
    held, labels = (np.asarray(v) for v in task.batch.upper[:2])
    for image, label in zip(images, task.labels, strict=True):
        found = (held == image).all(1)
        assert found.any()
        assert (labels[found] == label).all()
    assert len(np.unique(images, axis=0)) == 6


def test_networks_learn_from_real_images_and_not_from_noise(key):
    task = dbo.tasks.condensation(
        toy(31, 0),
        toy(21, 1),
        NETWORKS["perceptron"],
        per_class=2,
        evaluation_steps=100,
        step_size=0.1,
    )
    keys = jax.random.split(key, 8)
    x = jnp.stack([*map(task.images, keys[:4]), *map(task.noise, keys[4:])])
    found = jax.jit(jax.vmap(task.evaluate))(keys, x)
    learnt, guessed = found["test_accuracy"].reshape(2, 4).mean(1)
    assert learnt > 0.8 > 0.6 > guessed
    assert found["real_accuracy"][:4].mean() > 0.8
    assert found["real_loss"][:4].mean() < found["real_loss"][4:].mean()


def test_many_samples_are_judged_in_parts(key, monkeypatch):
    network = NETWORKS["perceptron"]
    y, inputs = network.init(key), jax.random.uniform(key, (11, SIDE**2))
    wanted = network.logits(y, inputs)
    module = importlib.import_module("dbojax.tasks.condensation")  # not the factory
    monkeypatch.setattr(module, "_PART", 4)
    found = jax.jit(module._in_parts, static_argnums=0)(network, y, inputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_each_inner_run_starts_from_a_fresh_network(task, key):
    def start(key, x, y):
        return task.init(key)

    inner = dbo.hypergradients.descent(task.problem, optax.sgd(0.0), 1, start)
    solve = jax.jit(dbo.hypergradients.solver(inner))
    x, y = task.noise(key), task.init(key)
    one, same, other = (solve(jax.random.key(s), x, y, task.batch) for s in (0, 0, 1))
    kernels = [v["head"]["kernel"] for v in (one, same, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).all()


NARROW = toy(9, 0)._replace(inputs=np.ones((9, 5)))
MESSAGES = {
    "per_class": (lambda: dbo.tasks.condensation(per_class=0), "got per_class=0"),
    "penalty": (lambda: dbo.tasks.condensation(penalty=-1.0), "penalty=-1.0"),
    "alone": (lambda: dbo.tasks.condensation(toy(9, 0)), "come together"),
    "match": (
        lambda: dbo.tasks.condensation(toy(9, 0), NARROW),
        "has 16 features and 3 classes, `test` 5 and 3",
    ),
    "negative": (
        lambda: dbo.tasks.condensation(toy(9, 0), data.standardised(toy(9, 1))),
        "without centring",
    ),
    "images": (
        lambda: dbo.tasks.condensation(toy(9, 0), toy(9, 1), per_class=4).images(None),
        "3 images only; got per_class=4",
    ),
    "widths": (lambda: networks.perceptron(4, 2, (3, 0)), r"got \[4, 3, 0, 2\]"),
    "square": (lambda: networks.conv_net(8, 2), "got d=8"),
    "blocks": (lambda: networks.conv_net(36, 2, blocks=3), "blocks=2 or fewer"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case):
    call, words = MESSAGES[case]
    with pytest.raises(ValueError, match=words):
        call()
