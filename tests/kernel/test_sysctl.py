from __future__ import annotations

import pytest
from netns import Namespace, run

from hostd.dataplane import sysctl
from hostd.dataplane.sysctl import Setting


def test_a_tap_gets_what_it_needs_and_a_second_look_finds_nothing_to_do(netns: Namespace) -> None:
    netns.ip("link add vnet0 type veth peer name far0")
    wanted = sysctl.tap_sysctls("vnet0")
    assert sysctl.differing(wanted) != []
    sysctl.write_all(wanted)
    assert sysctl.differing(wanted) == []
    for key, value in wanted:
        assert run("sysctl", "-n", "net/" + key).strip() == value == sysctl.read(key)
    run("sysctl", "-qw", "net.ipv6.conf.vnet0.accept_ra=1")
    assert sysctl.differing(wanted) == [Setting("ipv6/conf/vnet0/accept_ra", "0")]
    untouched = sysctl.tap_sysctls("far0")
    assert len(sysctl.differing(untouched)) > 5


def test_names_with_dots_reach_their_own_interface(netns: Namespace) -> None:
    netns.ip("link add vnet0.7 type veth peer name far0")
    sysctl.write_all(sysctl.tap_sysctls("vnet0.7"))
    assert sysctl.read("ipv4/conf/vnet0.7/proxy_arp") == "1"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "all", "default", "a b", "a\n", "x" * 16, "é", "a\0"])
def test_odd_interface_names_are_refused(netns: Namespace, name: str) -> None:
    with pytest.raises(ValueError, match="interface name") as refused:
        sysctl.tap_sysctls(name)
    assert "\n" not in str(refused.value)


KEYS = [
    "",
    "ipv4",
    "/etc/passwd",
    "../kernel/hostname",
    "ipv4/../../kernel/hostname",
    "ipv4//ip_forward",
    "ipv4/x\n",
    "ipv4/./x",
]


@pytest.mark.parametrize("key", KEYS)
def test_nothing_outside_net_is_reached(netns: Namespace, key: str) -> None:
    with pytest.raises(ValueError, match="below net"):
        sysctl.read(key)
    with pytest.raises(ValueError, match="below net"):
        sysctl.write(key, "1")
    assert sysctl.read("ipv4/ip_forward") == "0"  # the control: the same door does open for a key of net


def test_what_is_missing_is_an_error(netns: Namespace) -> None:
    for call in (sysctl.write_all, sysctl.differing):
        with pytest.raises(FileNotFoundError):
            call(sysctl.tap_sysctls("vnet9"))


def test_without_ipv6_its_settings_are_left_out() -> None:
    assert {key.split("/")[0] for key, _ in sysctl.tap_sysctls("vnet0", ipv6=False)} == {"ipv4"}


def test_limits_are_raised_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {
        "ipv4/neigh/default/gc_thresh3": "1024",
        "ipv4/neigh/default/gc_thresh1": "100000",
        "netfilter/nf_conntrack_max": "262144",
    }

    def read(key: str) -> str:
        if key not in held:
            raise FileNotFoundError(key)
        return held[key]

    monkeypatch.setattr(sysctl, "read", read)
    monkeypatch.setattr(sysctl, "writable", lambda key: True)
    neighbours = Setting("ipv4/neigh/default/gc_thresh3", "65536")
    flows = Setting("netfilter/nf_conntrack_max", "1048576")
    assert sysctl.host_sysctls() == (neighbours, flows)
    monkeypatch.setattr(sysctl, "writable", lambda key: "neigh" in key)
    assert sysctl.host_sysctls() == (neighbours,)


def test_only_the_first_namespace_has_the_limit_of_tracked_flows(netns: Namespace) -> None:
    chain = "chain c { type filter hook forward priority 0; ct state new accept; }"
    run("nft", "-f", "-", stdin=f"table inet x {{ {chain}; }}")
    assert not sysctl.writable("netfilter/nf_conntrack_max")
    assert sysctl.writable("ipv4/ip_forward")
    assert sysctl.host_sysctls() == ()
