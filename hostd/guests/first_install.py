# Owns: the look at what runs when slash32 is first installed: untagged guests with ethernet NICs keep their network.
# Touches: libvirt, read-only, and /etc/slash32/guard-exempt. Only the package's first configuration runs it.
from __future__ import annotations

import sys

import libvirt

from slash32.model import EndpointKey
from slash32.tag import Domain, TagError, parse_domain

from ..config import Config
from . import exempt


def running_untagged(config: Config) -> set[str]:
    """Their taps; the guests are written to the list, which from then on is the operator's."""
    found = [
        (EndpointKey(domain.uuid, nic.mac), domain.name, nic.target)
        for domain in _running(config)
        if not domain.tagged
        for nic in domain.ethernet()
        if nic.mac and nic.target and nic.target.startswith(config.guard_prefixes)
    ]
    if found:
        exempt.write([(key, name) for key, name, _ in found])
        for key, name, tap in found:
            words = f"{name!a} ({tap}, {key.mac}) is untagged and runs: the guard lets it be"
            print(f"slash32-hostd: {words}", file=sys.stderr)
    return {tap for _, _, tap in found}


def _running(config: Config) -> list[Domain]:
    domains = []
    libvirt.registerErrorHandler(lambda *_: None, None)
    for uri in config.libvirt:
        try:
            connection = libvirt.openReadOnly(uri)
        except libvirt.libvirtError:
            continue  # no such driver, or libvirtd is not there: then nothing runs under it
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            try:
                domains.append(parse_domain(domain.XMLDesc().encode(), uri.partition(":")[0], absent_ok=True))
            except (TagError, libvirt.libvirtError):
                continue  # tagged, though wrongly: the guard has it; or gone meanwhile
        connection.close()
    return domains
