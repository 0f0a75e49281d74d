"""Model behavior that torch.export drops or fixes as constants: kept in a capture, or refused."""
