"""How values travel between nodes: one exchange, and what it costs in bytes.

Over a graph: :func:`exact`, :func:`reference_point`, :func:`error_feedback`. Over a
network that changes, loses messages or goes one way (`dbo.networks`): :func:`changing`,
:func:`changing_reference_point` and, for gradient push, :func:`push`. With a server,
which gives all workers the same estimate of the mean: :func:`server`, :func:`ef14`,
:func:`ef21`, :func:`two_way` and :func:`diana`; :func:`smoothed` averages what goes
into any of them. Over :func:`private` nothing travels.
"""

from dbojax.channels.changing import changing as changing
from dbojax.channels.changing import (
    changing_reference_point as changing_reference_point,
)
from dbojax.channels.changing import push as push
from dbojax.channels.gossip import error_feedback as error_feedback
from dbojax.channels.gossip import exact as exact
from dbojax.channels.gossip import reference_point as reference_point
from dbojax.channels.private import private as private
from dbojax.channels.server import diana as diana
from dbojax.channels.server import ef14 as ef14
from dbojax.channels.server import ef21 as ef21
from dbojax.channels.server import server as server
from dbojax.channels.server import smoothed as smoothed
from dbojax.channels.server import two_way as two_way
