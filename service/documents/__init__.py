"""Documents over HTTP: an embedded engine precomputes them, and answers questions over any of them."""
