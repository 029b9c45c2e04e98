"""Which tokens a query needs, and attention over them."""
