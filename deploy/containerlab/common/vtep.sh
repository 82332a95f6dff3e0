#!/bin/sh
# Makes this leaf a VTEP of the stretched L2VNI 100: bridge, VXLAN device, the hosts' access ports.
# usage: vtep.sh FRR_CONF [ACCESS_PORT...]
# The VTEP's address is the loopback of frr.conf, so that it is written down once.
set -eu
frr_conf=$1
shift
vtep=$(awk '/^interface /{lo = ($2 == "lo")} lo && $1 == "ip" && $2 == "address" {sub("/.*", "", $3); print $3; exit}' "$frr_conf")
[ -n "$vtep" ] || { echo "vtep.sh: $frr_conf has no 'ip address' under 'interface lo'" >&2; exit 1; }

ip link add br100 type bridge stp_state 0
# EVPN tells who is where: no learning from the wire. Room for the hosts' 4200 bytes (RoCE MTU 4096).
ip link add vxlan100 mtu 4200 type vxlan id 100 dstport 4789 local "$vtep" nolearning
ip link set vxlan100 master br100
for port in "$@"; do ip link set "$port" master br100; done
# A leaf has no address in the L2VNI: it only bridges.
for device in br100 vxlan100 "$@"; do
    ip link set "$device" addrgenmode none
    ip link set "$device" up
done
