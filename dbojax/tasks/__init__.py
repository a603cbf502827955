"""Problems with data, from closed-form quadratics to representations."""

from __future__ import annotations

from collections.abc import Callable

from dbojax.tasks import data as data
from dbojax.tasks import networks as networks
from dbojax.tasks import pde as pde
from dbojax.tasks import readers as readers
from dbojax.tasks import representations as representations
from dbojax.tasks import samplers as samplers
from dbojax.tasks import sparse as sparse
from dbojax.tasks import spectral as spectral
from dbojax.tasks.classification import coefficient_tuning as coefficient_tuning
from dbojax.tasks.classification import hyper_cleaning as hyper_cleaning
from dbojax.tasks.classification import hyper_representation as hyper_representation
from dbojax.tasks.condensation import Condensation as Condensation
from dbojax.tasks.condensation import condensation as condensation
from dbojax.tasks.federated_toy import federated_toy as federated_toy
from dbojax.tasks.federated_toy import solve_federated_toy as solve_federated_toy
from dbojax.tasks.losses import logistic_loss as logistic_loss
from dbojax.tasks.noise import with_gradient_noise as with_gradient_noise
from dbojax.tasks.pde import Coefficient as Coefficient
from dbojax.tasks.pde import pde_coefficient as pde_coefficient
from dbojax.tasks.quadratics import quadratic as quadratic
from dbojax.tasks.quadratics import with_equal_curvature as with_equal_curvature
from dbojax.tasks.quadratics import worker_quadratic as worker_quadratic
from dbojax.tasks.representations import Backbone as Backbone
from dbojax.tasks.representations import mlp as mlp
from dbojax.tasks.single_level import SingleLevel as SingleLevel
from dbojax.tasks.single_level import logistic_regression as logistic_regression
from dbojax.tasks.task import ClosedForm as ClosedForm
from dbojax.tasks.task import Task as Task
from dbojax.tasks.text import newsgroups as newsgroups
from dbojax.tasks.text import sparse_coefficient_tuning as sparse_coefficient_tuning
from dbojax.tasks.text import sparse_text as sparse_text

NAMES: dict[str, Callable[..., Task]] = {
    "quadratic": quadratic,
    "worker_quadratic": worker_quadratic,
    "coefficient_tuning": coefficient_tuning,
    "sparse_coefficient_tuning": sparse_coefficient_tuning,
    "hyper_cleaning": hyper_cleaning,
    "hyper_representation": hyper_representation,
    "federated_toy": federated_toy,
}


def named(name: str) -> Callable[..., Task]:
    """Find the factory of a task by its name, for command lines.

    Raises:
        ValueError: if there is no such task.

    Examples:
        >>> named("quadratic")(n=4).n
        4
    """
    if name not in NAMES:
        raise ValueError(f"No task is named {name!r}. Write one of {sorted(NAMES)}.")
    return NAMES[name]
