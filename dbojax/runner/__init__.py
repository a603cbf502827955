"""Running an algorithm: chunks of one compiled scan, history, checkpoints, sweeps."""

from dbojax.runner import checkpoints as checkpoints
from dbojax.runner.feeds import HostBatches as HostBatches
from dbojax.runner.feeds import from_host as from_host
from dbojax.runner.history import History as History
from dbojax.runner.loop import DivergedError as DivergedError
from dbojax.runner.loop import run as run
from dbojax.runner.peers import PeerLostError as PeerLostError
from dbojax.runner.sweeps import sweep as sweep
from dbojax.runner.sweeps import vmapped as vmapped
