"""The daemon's face to programs: HTTP on a Unix socket, and /metrics on TCP."""

DEFAULT_SOCKET = "/run/qpd/qpd.sock"
"""Where the daemon listens and ``qpctl`` asks unless told otherwise (``api.socket``, ``--socket``)."""
