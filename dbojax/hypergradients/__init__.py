"""Estimators of ``d/dx f(x, y*(x))`` on one machine, all of one type."""

from dbojax.hypergradients import linear as linear
from dbojax.hypergradients import projections as projections
from dbojax.hypergradients.differentiable import fixed_point as fixed_point
from dbojax.hypergradients.differentiable import implicit_diff as implicit_diff
from dbojax.hypergradients.first_order import darts as darts
from dbojax.hypergradients.first_order import penalty as penalty
from dbojax.hypergradients.implicit import bicgstab as bicgstab
from dbojax.hypergradients.implicit import cg as cg
from dbojax.hypergradients.implicit import dense as dense
from dbojax.hypergradients.implicit import gmres as gmres
from dbojax.hypergradients.implicit import hessian_free as hessian_free
from dbojax.hypergradients.implicit import implicit as implicit
from dbojax.hypergradients.implicit import neumann as neumann
from dbojax.hypergradients.implicit import normal_cg as normal_cg
from dbojax.hypergradients.implicit import soba as soba
from dbojax.hypergradients.inner import Inner as Inner
from dbojax.hypergradients.inner import descent as descent
from dbojax.hypergradients.inner import solver as solver
from dbojax.hypergradients.unrolled import checkpointed as checkpointed
from dbojax.hypergradients.unrolled import forward as forward
from dbojax.hypergradients.unrolled import nested as nested
from dbojax.hypergradients.unrolled import reverse as reverse
from dbojax.hypergradients.unrolled import truncated as truncated
