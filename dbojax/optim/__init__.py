"""Compressed communication as optax transforms, and the optimisers built on it.

:func:`communicate` puts any channel in front of any optax transform. The named methods
take stacked gradients ``(n, ...)`` and parameters without node axis, as it does over a
channel with a server, and its ``axis_name`` inside ``jax.shard_map``. The bytes of one
step are in the state: ``optax.tree.get(state, "traffic")``.
"""

from dbojax.optim.adaptive import cd_adam as cd_adam
from dbojax.optim.amsgrad import AmsgradState as AmsgradState
from dbojax.optim.amsgrad import scale_by_amsgrad as scale_by_amsgrad
from dbojax.optim.amsgrad import two_step_decay as two_step_decay
from dbojax.optim.descent import ef21_sgd as ef21_sgd
from dbojax.optim.descent import ef21_sgdm as ef21_sgdm
from dbojax.optim.descent import ef_sgd as ef_sgd
from dbojax.optim.exchange import CommunicateState as CommunicateState
from dbojax.optim.exchange import communicate as communicate
from dbojax.optim.exchange import per_node as per_node
from dbojax.optim.low_rank import PowersgdState as PowersgdState
from dbojax.optim.low_rank import powersgd as powersgd
from dbojax.optim.one_bit import OneBitState as OneBitState
from dbojax.optim.one_bit import one_bit_adam as one_bit_adam
from dbojax.optim.one_bit import one_bit_adam_on_gradients as one_bit_adam_on_gradients
