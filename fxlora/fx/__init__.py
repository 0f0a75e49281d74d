"""Helpers that torch.fx lacks: arguments by name, nested graphs, writes, graph comparison."""
