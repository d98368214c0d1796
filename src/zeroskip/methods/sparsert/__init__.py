"""SparseRT: the weights are the program."""
