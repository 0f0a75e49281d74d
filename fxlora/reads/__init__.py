"""The nodes that read each weight, and the chain of ops from the weight to each of them."""
