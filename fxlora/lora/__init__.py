"""The mathematics of LoRA: weight layouts, ops, initializations, variants and packed parts."""
