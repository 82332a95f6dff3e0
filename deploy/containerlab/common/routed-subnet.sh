#!/bin/sh
# The host's end of its leaf's routed subnet (see vrf.sh): VLAN 20 on its port, and the way to the other leaves' subnets.
# usage: routed-subnet.sh PORT ADDRESS/LENGTH GATEWAY
set -eu
port=$1
address=$2
gateway=$3
if ! ip link add link "$port" name "$port.20" type vlan id 20 2>/dev/null; then
    echo "routed-subnet.sh: this kernel has no VLAN devices: the routed subnet is left out"
    exit 0
fi
ip address add "$address" dev "$port.20"
ip link set "$port.20" up
ip route add 10.20.0.0/16 via "$gateway"
