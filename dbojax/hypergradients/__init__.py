"""Estimators of ``d/dx f(x, y*(x))`` on one machine, all of one type."""

from dbojax.hypergradients import directions as directions
from dbojax.hypergradients import linear as linear
from dbojax.hypergradients import projections as projections
from dbojax.hypergradients.differentiable import fixed_point as fixed_point
from dbojax.hypergradients.differentiable import implicit_diff as implicit_diff
from dbojax.hypergradients.first_order import darts as darts
from dbojax.hypergradients.first_order import penalty as penalty
from dbojax.hypergradients.forward_gradient import ForwardGradient as ForwardGradient
from dbojax.hypergradients.forward_gradient import forward_gradient as forward_gradient
from dbojax.hypergradients.forward_gradient import forward_scalars as forward_scalars
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
from dbojax.hypergradients.online import (
    online_forward_gradient as online_forward_gradient,
)
from dbojax.hypergradients.persistent import pes as pes
from dbojax.hypergradients.spread import spread as spread
from dbojax.hypergradients.two_phase import two_phase as two_phase
from dbojax.hypergradients.unrolled import checkpointed as checkpointed
from dbojax.hypergradients.unrolled import forward as forward
from dbojax.hypergradients.unrolled import nested as nested
from dbojax.hypergradients.unrolled import reverse as reverse
from dbojax.hypergradients.unrolled import truncated as truncated
from dbojax.hypergradients.zeroth_order import antithetic_es as antithetic_es
from dbojax.hypergradients.zeroth_order import central as central
from dbojax.hypergradients.zeroth_order import es as es
from dbojax.hypergradients.zeroth_order import one_sided as one_sided
from dbojax.hypergradients.zeroth_order import zeroth_order as zeroth_order
