"""The model's own class around a captured module, or with its folded weights."""
