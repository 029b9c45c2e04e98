"""How chunks move between clients and memory: sockets, shared memory, containers."""
