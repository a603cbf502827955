"""Estimators of ``d/dx f(x, y*(x))`` on one machine, all of one type."""

from dbojax.hypergradients import directions as directions
from dbojax.hypergradients.forward_gradient import ForwardGradient as ForwardGradient
from dbojax.hypergradients.forward_gradient import forward_gradient as forward_gradient
from dbojax.hypergradients.forward_gradient import forward_scalars as forward_scalars
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
