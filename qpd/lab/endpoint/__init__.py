"""An emulated RoCEv2 endpoint: RC queue pairs as adapters have them, over sockets.

Pure: `requester`, `responder`, `dcqcn` (the protocol, time passed in), `frames` (bytes), `connections` (numbers and
ports). With I/O: `adapter` (sockets), `program` (a process on a host), `traffic` (such processes on a fabric).
"""
