#!/bin/sh
# Removes a lab and what `containerlab destroy` leaves of it: the volumes of FRR's sockets, qpd's pins, its own directory.
# usage: destroy.sh NAME.clab.yml
set -eu
topology=$1
lab=clab-$(sed -n 's/^name: *//p' "$topology")
containerlab destroy --topo "$topology" --cleanup
docker volume ls --quiet --filter "name=^$lab-" | xargs -r docker volume rm >/dev/null
rm -rf "/sys/fs/bpf/qplab/$lab"
rmdir /sys/fs/bpf/qplab 2>/dev/null || true
