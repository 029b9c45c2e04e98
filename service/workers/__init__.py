"""Further processes that speak HTTP and TLS for one service, and move the bodies of chunks through shared memory."""
