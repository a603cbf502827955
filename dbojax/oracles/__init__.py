"""Local directions of the upper, lower and auxiliary variables at one node."""

from dbojax.oracles.differences import finite_difference as finite_difference
from dbojax.oracles.differences import one_step_difference as one_step_difference
from dbojax.oracles.differences import perturbed as perturbed
from dbojax.oracles.estimated import from_hypergradient as from_hypergradient
from dbojax.oracles.memoryless import penalty as penalty
from dbojax.oracles.memoryless import soba as soba
from dbojax.oracles.neumann import local_neumann as local_neumann
from dbojax.oracles.saba import saba as saba
from dbojax.oracles.storm import storm as storm
