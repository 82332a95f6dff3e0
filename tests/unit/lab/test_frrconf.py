"""What is read out of frr.conf and of the daemons file."""

from __future__ import annotations

from qpd.lab import frr, frrconf

TEXT = """
hostname leaf1
interface lo
 ip address 10.255.0.11/32
 ip address 10.255.0.99/32
exit
interface eth1
 ip address 10.1.11.1/31
exit
router bgp 65111
 neighbor SPINES peer-group
 neighbor SPINES remote-as external
 neighbor 10.1.11.0 remote-as 65100
 neighbor 10.1.11.0 description spine1
 neighbor eth2 interface peer-group SPINES
 address-family ipv4 unicast
  neighbor SPINES activate
exit
! router bgp 1
router bgp 65111 vrf tenant
 neighbor 192.0.2.1 remote-as 1
"""


def test_addresses_as_number_and_neighbors() -> None:
    conf = frrconf.parse(TEXT)
    assert (conf.hostname, conf.asn, conf.loopback) == ("leaf1", 65111, "10.255.0.11")
    assert conf.neighbors == ["10.1.11.0", "eth2"], "neither peer groups nor other VRFs"


def test_the_neighbor_of_an_interface_numbered_and_unnumbered() -> None:
    conf = frrconf.parse(TEXT)
    assert conf.neighbor_on("eth1") == "10.1.11.0"
    assert conf.neighbor_on("eth2") == "eth2"
    assert conf.neighbor_on("eth3") is None


def test_nothing_is_nothing() -> None:
    conf = frrconf.parse("!\n\n! hostname x\n")
    assert (conf.hostname, conf.asn, conf.loopback, conf.neighbors) == ("", 0, None, [])


def test_daemons_that_are_switched_on_with_their_options() -> None:
    text = 'bgpd=yes\nospfd=no\n#bfdd=yes\nvtysh_enable=yes\nbgpd_options="   -A 127.0.0.1 -M rpki"\n'
    assert frr.parse_daemons(text) == {"zebra": [], "bgpd": ["-A", "127.0.0.1", "-M", "rpki"]}
