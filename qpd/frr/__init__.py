"""What FRR knows and qpd wants to: BFD sessions and the host names of BGP peers, over the daemons' vty sockets."""
