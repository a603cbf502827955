"""Estimators of ``d/dx f(x, y*(x))`` on one machine, all of one type."""

from dbojax.hypergradients.inner import Inner as Inner
from dbojax.hypergradients.inner import descent as descent
from dbojax.hypergradients.inner import solver as solver
from dbojax.hypergradients.unrolled import checkpointed as checkpointed
from dbojax.hypergradients.unrolled import forward as forward
from dbojax.hypergradients.unrolled import nested as nested
from dbojax.hypergradients.unrolled import reverse as reverse
from dbojax.hypergradients.unrolled import truncated as truncated
