"""The nouns: facts about layers and devices, the graph, and the contract of a method."""
