"""Many devices, processes and hosts under one script: where nodes and payloads go."""

from dbojax.devices.compiled import keep_compiled as keep_compiled
from dbojax.devices.meshes import init as init
from dbojax.devices.meshes import load as load
from dbojax.devices.meshes import mesh as mesh
from dbojax.devices.meshes import place as place
from dbojax.devices.processes import is_first as is_first
from dbojax.devices.processes import start as start
from dbojax.devices.spread import crossings as crossings
from dbojax.devices.spread import spread as spread
from dbojax.devices.wire import wire as wire
