#!/bin/sh
# qpd as a sidecar's first process. Its pins lie in the machine's bpffs, under the lab's, the node's and the network
# namespace's name: they outlive this container, but not the leaf that they were made for.
set -eu
node=/sys/fs/bpf/qplab/clab-$CLAB_LABEL_CONTAINERLAB/$CLAB_LABEL_CLAB_NODE_NAME
# SO_NETNS_COOKIE (71): unlike the namespace's inode number, it is not used again.
namespace=$(python3 -c '
import socket
print(int.from_bytes(socket.socket().getsockopt(socket.SOL_SOCKET, 71, 8), "little"))')
for pins in "$node"/*; do
    [ ! -d "$pins" ] || [ "$pins" = "$node/$namespace" ] || rm -r "$pins"
done
export QPD_BPF__PIN_DIR="$node/$namespace"
exec qpd run
