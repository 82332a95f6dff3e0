#!/bin/sh
# The tenant's L3VNI 1000: a routed host subnet per leaf (VLAN 20 on the access port), carried as EVPN type-5 routes.
# usage: vrf.sh ACCESS_PORT GATEWAY/LENGTH
set -eu
port=$1
gateway=$2
if ! ip link add tenant type vrf table 1000 2>/dev/null; then
    echo "vrf.sh: this kernel has no VRF: L3VNI 1000 is left out"
    exit 0
fi
ip link set tenant up
# The loopback may have its address from FRR only later; the L2VNI's device (vtep.sh) has it already.
vtep=$(ip -o -d link show vxlan100 | sed -n 's/.* local \([0-9.]*\) .*/\1/p')
ip link add br1000 type bridge stp_state 0
ip link set br1000 master tenant addrgenmode none
# Without "local" the kernel would choose an uplink's address as the tunnel's source.
ip link add vxlan1000 mtu 4200 type vxlan id 1000 dstport 4789 local "$vtep" nolearning
ip link set vxlan1000 master br1000 addrgenmode none
ip link add link "$port" name "$port.20" type vlan id 20
ip link set "$port.20" master tenant
ip address add "$gateway" dev "$port.20"
for device in br1000 vxlan1000 "$port.20"; do ip link set "$device" up; done
