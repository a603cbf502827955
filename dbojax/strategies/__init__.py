"""How one decentralised variable moves along local directions and reaches consensus.

Rows are nodes, ``D`` the stacked directions, ``W V`` one exchange over a channel, and
``-alpha T`` an optax transform that every node applies to its own row of ``T``, e.g.
``optax.sgd(alpha)``.
"""

from dbojax.strategies.averaging import allreduce as allreduce
from dbojax.strategies.diffusion import diffusion_atc as diffusion_atc
from dbojax.strategies.diffusion import diffusion_cta as diffusion_cta
from dbojax.strategies.momentum import gossiped_average as gossiped_average
from dbojax.strategies.primal_dual import exact_diffusion as exact_diffusion
from dbojax.strategies.primal_dual import extra as extra
from dbojax.strategies.primal_dual import nids as nids
from dbojax.strategies.push import gradient_push as gradient_push
from dbojax.strategies.tracking import gradient_tracking as gradient_tracking
from dbojax.strategies.tracking import gradient_tracking_atc as gradient_tracking_atc
from dbojax.strategies.tracking import (
    gradient_tracking_semi_atc as gradient_tracking_semi_atc,
)
from dbojax.strategies.wrappers import ball as ball
from dbojax.strategies.wrappers import moving_average as moving_average
from dbojax.strategies.wrappers import projected as projected
