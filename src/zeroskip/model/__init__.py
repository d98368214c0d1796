"""``nn.Module`` -> ``Program``: the graph, its tensors, and passes that simplify both without changing a value."""
