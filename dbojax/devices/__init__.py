"""Many devices, processes and hosts under one script."""

from dbojax.devices.processes import is_first as is_first
from dbojax.devices.processes import start as start
