"""Published methods as compositions of parts, and the composer itself."""

from dbojax.algorithms.c2dfb import c2dfb as c2dfb
from dbojax.algorithms.compose import BilevelState as BilevelState
from dbojax.algorithms.compose import Phase as Phase
from dbojax.algorithms.compose import compose as compose
from dbojax.algorithms.ma_dsbo import ma_dsbo as ma_dsbo
