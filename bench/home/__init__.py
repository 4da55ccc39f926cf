"""An emulated home: devices on one machine with links and limits of their own (home.py); `python -m bench.home`."""

from bench.home.devices import Device, Link, equal_devices, read_devices
from bench.home.home import Home
from bench.home.sweep import HomeError, clean

__all__ = ["Device", "Home", "HomeError", "Link", "clean", "equal_devices", "read_devices"]
