"""What torch.export drops or takes for granted, and fxlora keeps or refuses."""
