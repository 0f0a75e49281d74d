"""What torch.fx lacks: arguments by name, nested graphs, writes, comparison of graphs."""
