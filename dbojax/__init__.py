"""Distributed bilevel optimisation in JAX, composed from small parts."""

__version__ = "0.1.0"

from dbojax import algorithms as algorithms
from dbojax import base as base
from dbojax import channels as channels
from dbojax import compressors as compressors
from dbojax import hypergradients as hypergradients
from dbojax import mixing as mixing
from dbojax import optim as optim
from dbojax import oracles as oracles
from dbojax import plots as plots
from dbojax import runner as runner
from dbojax import strategies as strategies
from dbojax import submodels as submodels
from dbojax import tasks as tasks
from dbojax import topology as topology
from dbojax import trees as trees
from dbojax.base import Algorithm as Algorithm
from dbojax.base import Batch as Batch
from dbojax.base import Calls as Calls
from dbojax.base import Channel as Channel
from dbojax.base import Compressor as Compressor
from dbojax.base import Hypergradient as Hypergradient
from dbojax.base import Indexed as Indexed
from dbojax.base import Metrics as Metrics
from dbojax.base import Mix as Mix
from dbojax.base import Oracle as Oracle
from dbojax.base import Participation as Participation
from dbojax.base import Problem as Problem
from dbojax.base import Rounds as Rounds
from dbojax.base import Strategy as Strategy
from dbojax.base import Traffic as Traffic
from dbojax.hypergradients import implicit_diff as implicit_diff
from dbojax.optim import communicate as communicate
from dbojax.optim import per_node as per_node
from dbojax.runner import DivergedError as DivergedError
from dbojax.runner import History as History
from dbojax.runner import checkpoints as checkpoints
from dbojax.runner import from_host as from_host
from dbojax.runner import run as run
from dbojax.runner import sweep as sweep
from dbojax.runner import vmapped as vmapped
from dbojax.trees import consensus_error as consensus_error
from dbojax.trees import node_mean as node_mean
from dbojax.trees import participation as participation
from dbojax.trees import replicate as replicate
