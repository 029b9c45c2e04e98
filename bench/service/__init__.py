"""The service's speed, over shared memory and over HTTP."""
