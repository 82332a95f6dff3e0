"""What touches the kernel: the classifier and its maps, netlink, the routing table. Nothing here decides."""
