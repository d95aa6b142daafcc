"""Federated learning for devices that are not equal: every device trains the part that fits it."""
