"""Which method runs which piece of the graph, and why: decisions as data."""
