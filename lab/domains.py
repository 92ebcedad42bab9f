"""libvirt XML of lab guests: text in, text out, touches nothing. The guests themselves are lab/guest.py's."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

NAMESPACE = "urn:slash32:domain:1"
DOORS = "/run/slash32-lab"
CMDLINE = "console=ttyS0 quiet mitigations=off nokaslr no_timer_check net.ifnames=0 rdinit=/init panic=1"
Addresses = str | Sequence[str]


def tag_xml(mac: str, addresses: Sequence[str], labels: Mapping[str, str], profiles: Sequence[str] = ()) -> str:
    """The slash32 element of one interface."""
    parts = [f"<slash32:label key={quoteattr(key)} value={quoteattr(value)}/>" for key, value in labels.items()]
    parts += [f"<slash32:profile name={quoteattr(name)}/>" for name in profiles]
    nic = "".join(f"<slash32:address>{escape(address)}</slash32:address>" for address in addresses)
    parts.append(f"<slash32:interface mac={quoteattr(mac)}>{nic}</slash32:interface>")
    return f'<slash32:endpoint xmlns:slash32="{NAMESPACE}">{"".join(parts)}</slash32:endpoint>'


def qemu_domain(
    name: str,
    *,
    uuid: str | None = None,
    mac: str = "52:54:00:00:00:02",
    addr4: Addresses = (),
    addr6: Addresses = (),
    labels: Mapping[str, str] | None = None,
    profiles: Sequence[str] = (),
    tag: bool | str = True,
    extra: str = "",
    target: str | None = None,
    words: Sequence[str] = (),
    memory: int = 128,
) -> str:
    """A TCG guest with one ethernet NIC. TAG: True makes the slash32 element, False leaves it out, text is put as it
    is. EXTRA goes into <devices>; TARGET names the tap; WORDS (see lab/guest/init) go to the guest."""
    four, six = _list(addr4), _list(addr6)
    cmdline = " ".join([CMDLINE, *_words(name, four, six), *words])
    return f"""<domain type='qemu'>
  {_head(name, uuid, memory, _tag(tag, mac, four + six, labels, profiles))}
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/opt/guest/vmlinuz</kernel><initrd>/opt/guest/initrd.gz</initrd>
    <cmdline>{escape(cmdline)}</cmdline></os>
  <features><acpi/></features>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    {_nic(mac, target, "<model type='virtio'/><rom enabled='no'/>")}
    <controller type='usb' model='none'/><memballoon model='none'/>
    <serial type='pty'><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{DOORS}/{name}.sock'/><target port='1'/></serial>
    {extra}
  </devices>
</domain>
"""


def lxc_domain(
    name: str,
    *,
    uuid: str | None = None,
    mac: str = "52:54:00:00:00:03",
    addr4: Addresses = (),
    addr6: Addresses = (),
    labels: Mapping[str, str] | None = None,
    profiles: Sequence[str] = (),
    tag: bool | str = True,
    extra: str = "",
    target: str | None = None,
    words: Sequence[str] = (),
    memory: int = 64,
) -> str:
    """A container with one ethernet NIC, eth0; the arguments are those of qemu_domain."""
    four, six = _list(addr4), _list(addr6)
    arguments = "".join(f"<initarg>{escape(word)}</initarg>" for word in ["lxc", *_words(name, four, six), *words])
    return f"""<domain type='lxc'>
  {_head(name, uuid, memory, _tag(tag, mac, four + six, labels, profiles))}
  <os><type>exe</type><init>/bin/init</init>{arguments}</os>
  <devices>
    <filesystem type='mount'><source dir='/opt/guest/lxcroot'/><target dir='/'/></filesystem>
    <filesystem type='ram'><source usage='16384' units='KiB'/><target dir='/tmp'/></filesystem>
    {_nic(mac, target, "<guest dev='eth0'/>")}
    <console type='pty'/>
    {extra}
  </devices>
</domain>
"""


def _list(addresses: Addresses) -> list[str]:
    return [addresses] if isinstance(addresses, str) else list(addresses)


def _words(name: str, four: list[str], six: list[str]) -> list[str]:
    words = [f"s32.host={name}"]
    if four:
        words.append(f"s32.addr={','.join(four)}")
    if six:
        words.append(f"s32.addr6={','.join(six)}")
    return words


def _head(name: str, uuid: str | None, memory: int, tag: str) -> str:
    identity = uuid or str(uuids.uuid5(uuids.NAMESPACE_DNS, f"{name}.slash32-lab"))
    metadata = f"<metadata>{tag}</metadata>" if tag else ""
    size = f"<memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>"
    return f"<name>{escape(name)}</name><uuid>{identity}</uuid>{size}{metadata}"


def _tag(
    tag: bool | str, mac: str, addresses: list[str], labels: Mapping[str, str] | None, profiles: Sequence[str]
) -> str:
    if isinstance(tag, str):
        return tag
    return tag_xml(mac, addresses, labels or {}, profiles) if tag else ""


def _nic(mac: str, target: str | None, rest: str) -> str:
    dev = f"<target dev={quoteattr(target)}/>" if target else ""
    return f"<interface type='ethernet'><mac address={quoteattr(mac)}/>{dev}{rest}</interface>"
