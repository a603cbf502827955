"""Graphs and mixing matrices, in NumPy: adjacency first, then weights.

A graph is a boolean adjacency matrix without loops, ``a[i, j]`` true when node ``i``
hears node ``j``; a mixing matrix ``w`` is doubly stochastic on a connected graph. For
graphs that change there are sequences of matrices, which `dbo.networks` takes, as it
does the column-stochastic :func:`push_weights` of directed graphs.
"""

from dbojax.base import is_connected as is_connected
from dbojax.topology.graphs import complete as complete
from dbojax.topology.graphs import erdos_renyi as erdos_renyi
from dbojax.topology.graphs import exponential as exponential
from dbojax.topology.graphs import from_networkx as from_networkx
from dbojax.topology.graphs import hypercube as hypercube
from dbojax.topology.graphs import ring as ring
from dbojax.topology.graphs import star as star
from dbojax.topology.graphs import torus as torus
from dbojax.topology.sequences import one_peer_exponential as one_peer_exponential
from dbojax.topology.sequences import random_matchings as random_matchings
from dbojax.topology.weights import check as check
from dbojax.topology.weights import laplacian as laplacian
from dbojax.topology.weights import lazy as lazy
from dbojax.topology.weights import metropolis as metropolis
from dbojax.topology.weights import push_weights as push_weights
from dbojax.topology.weights import spectral_gap as spectral_gap
from dbojax.topology.weights import uniform as uniform
