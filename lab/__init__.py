"""Rack in a box: real Debian hypervisors with systemd and libvirtd, in namespaces of one machine.

Owns nothing but this docstring; the work files of every module here live under lab.paths.work().
"""
