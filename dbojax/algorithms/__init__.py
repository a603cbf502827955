"""Published methods as compositions of parts, and the composer itself."""

from dbojax.algorithms.c2dfb import c2dfb as c2dfb
from dbojax.algorithms.c_soba import c_soba as c_soba
from dbojax.algorithms.c_soba import cm_soba as cm_soba
from dbojax.algorithms.c_soba import ef_soba as ef_soba
from dbojax.algorithms.compose import BilevelState as BilevelState
from dbojax.algorithms.compose import Phase as Phase
from dbojax.algorithms.compose import compose as compose
from dbojax.algorithms.compose import local_step as local_step
from dbojax.algorithms.fedbio import fedbio as fedbio
from dbojax.algorithms.federated import FederatedState as FederatedState
from dbojax.algorithms.federated import covered as covered
from dbojax.algorithms.federated import everyone as everyone
from dbojax.algorithms.federated import federated as federated
from dbojax.algorithms.fednest import fednest as fednest
from dbojax.algorithms.fg2u import fg2u_own as fg2u_own
from dbojax.algorithms.fg2u import fg2u_shared as fg2u_shared
from dbojax.algorithms.ma_dsbo import ma_dsbo as ma_dsbo
from dbojax.algorithms.personal import personal as personal
from dbojax.algorithms.rabo import rabo as rabo
from dbojax.algorithms.rabo import rafbo as rafbo
from dbojax.algorithms.simfbo import shrofbo as shrofbo
from dbojax.algorithms.simfbo import simfbo as simfbo
from dbojax.algorithms.soba import ma_soba as ma_soba
from dbojax.algorithms.soba import saba as saba
from dbojax.algorithms.soba import soba as soba
