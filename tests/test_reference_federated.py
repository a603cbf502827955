"""The NumPy twins of the federated methods against calculus and against each other."""

import jax
import numpy as np
import pytest
import reference_federated as twin

import dbojax as dbo

STEPS = (0.05, 0.1, 0.1)


@pytest.fixture(scope="module")
def task():
    return dbo.tasks.federated_toy(n=4, dx=6, dy=5)


@pytest.fixture(scope="module")
def clients(task):
    return twin.toy_clients(task)


@pytest.fixture(scope="module")
def start(task):
    return np.asarray(task.x0), np.full(5, 0.3), np.linspace(-1, 1, 5)


def test_derivatives_by_hand_are_those_of_the_task(task, clients, start):
    x, y, z = start

    @jax.jit
    def derivatives(x, y, z, batch):
        slope, pull = jax.vjp(
            lambda x, y: jax.grad(task.problem.lower, 1)(x, y, batch.lower), x, y
        )
        upper = jax.grad(task.problem.upper, (0, 1))(x, y, batch.upper)
        return upper, jax.grad(task.problem.lower)(x, y, batch.lower), slope, pull(z)

    batch = jax.tree.map(lambda leaf: leaf[2], task.batch)
    upper, *lower, products = derivatives(x, y, z, batch)
    client = clients[2]
    for wanted, found in (
        (upper, client.upper(x, y)),
        (lower, client.lower(x, y)),
        (products, client.products(x, y, z)),
    ):
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-12, atol=1e-14)


def test_differences_of_gradients_are_of_order_two(clients, start):
    wanted = twin.exact(clients[0], *start)
    errors = []
    for radius in (1e-1, 1e-2):
        found = twin.difference(radius)(clients[0], *start)
        np.testing.assert_array_equal(found[1], wanted[1])
        errors.append([np.abs(found[k] - wanted[k]).max() for k in (0, 2)])
    # g is quadratic in y but for the softplus, which d_x does not see.
    assert max(errors[0][0], errors[1][0]) < 1e-11
    assert 80 < errors[0][1] / errors[1][1] < 120


def test_no_difference_along_nothing(clients, start):
    x, y, z = start
    d_x, _, d_z = twin.difference(1e-3)(clients[0], x, y, 0 * z)
    f_x, f_y = clients[0].upper(x, y)
    np.testing.assert_array_equal(d_x, f_x)
    np.testing.assert_array_equal(d_z, -f_y)


@pytest.mark.parametrize("local", [1, 3])
def test_full_masks_are_simfbo_with_differences(clients, start, local):
    rounds = [twin.full_round(clients, 6, 5, local)] * 5
    settings = {"directions": twin.difference(1e-3), "steps": STEPS, "radius": 1.5}
    ours = twin.rafbo(clients, start, rounds, server_steps=(0.9, 1, 0.8), **settings)
    gammas = [g * step for g, step in zip((0.9, 1, 0.8), STEPS, strict=True)]
    theirs = twin.simfbo(clients, start, rounds, gammas=gammas, **settings)
    for found, wanted in zip(ours[-1], theirs[-1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    # A server step of one leaves plain averages, without a projection.
    ours = twin.rafbo(clients, start, rounds, directions=twin.exact, steps=STEPS)
    theirs = twin.fedbio(clients, start, rounds, steps=STEPS)
    for found, wanted in zip(ours[-1], theirs[-1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_aggregation_divides_by_the_holders_and_leaves_the_rest():
    masks = np.array([[1, 1, 0, 0], [1, 0, 0, 1]])
    parts = [twin.Part(i, row, row) for i, row in enumerate(masks)]
    moves = [np.array([2.0, 4.0, 0, 0]), np.array([6.0, 0, 0, 8.0])]
    found = twin.aggregated(np.zeros(4), parts, "x", moves, 1.0)
    np.testing.assert_array_equal(found, [-4, -4, 0, -8])
    halved = twin.aggregated(np.zeros(4), parts, "x", moves, 0.5, divide_by=2)
    np.testing.assert_array_equal(halved, [-2, -1, 0, -2])


def test_restricted_systems_are_solved_and_full_solutions_not_masked():
    class Quadratic:
        """g = y'Hy / 2 and grad_y f = (1, 1)."""

        hessian = np.array([[2.0, 1.0], [1.0, 2.0]])

        def upper(self, x, y):
            return 0 * x, np.ones(2)

        def lower(self, x, y):
            return 0 * x, self.hessian @ y

    part = twin.Part(0, np.ones(1), np.array([1.0, 0.0]))
    start = (np.zeros(1), np.zeros((1, 2)), np.zeros((1, 2)))
    path = twin.rabo(
        [Quadratic()],
        start,
        [[part]] * 100,
        directions=twin.difference(1e-3),
        steps=(0.1, 0.3, 0.3),
    )
    np.testing.assert_allclose(path[-1][2][0], [0.5, 0], atol=1e-10)


@pytest.mark.parametrize("reduced", [True, False], ids=["svrg", "sgd"])
def test_fednest_with_many_terms_descends_along_the_true_hypergradient(
    task, clients, start, reduced
):
    x, y, _ = start
    rounds = [twin.full_round(clients, 6, 5)]
    settings = {"upper_step": 0.1, "lower_step": 0.3, "linear_step": 0.3}
    ((_, _), (x_new, y_new)) = twin.fednest(
        clients,
        (x, y),
        rounds,
        inner_rounds=150,
        terms=200,
        reduced=reduced,
        **settings,
    )
    exact = dbo.tasks.solve_federated_toy(task.batch)
    np.testing.assert_allclose(y_new, jax.jit(exact.solution)(x), atol=1e-10)
    wanted = jax.jit(exact.hypergradient)(x)
    np.testing.assert_allclose((x - x_new) / 0.1, wanted, atol=1e-9)


def test_only_variance_reduction_frees_local_steps_of_drift(task, clients, start):
    rounds = [twin.full_round(clients, 6, 5)]
    settings = {"upper_step": 0.0, "lower_step": 0.1, "linear_step": 0.1}
    wanted = jax.jit(dbo.tasks.solve_federated_toy(task.batch).solution)(start[0])
    errors = {}
    for reduced in (True, False):
        path = twin.fednest(
            clients,
            start[:2],
            rounds,
            inner_rounds=120,
            inner_steps=4,
            terms=0,
            reduced=reduced,
            **settings,
        )
        errors[reduced] = np.abs(path[-1][1] - wanted).max()
    assert errors[True] < 1e-9
    assert errors[False] > 1e-3
