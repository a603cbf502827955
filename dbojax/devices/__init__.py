"""Nodes on many devices: meshes, arrays placed on them, and what travels in between."""

from dbojax.devices.meshes import init as init
from dbojax.devices.meshes import load as load
from dbojax.devices.meshes import mesh as mesh
from dbojax.devices.meshes import place as place
from dbojax.devices.spread import crossings as crossings
from dbojax.devices.spread import spread as spread
from dbojax.devices.wire import wire as wire
