"""Pure logic: no I/O, no clock, no asyncio. ``now`` is handed in, operations are handed out."""
