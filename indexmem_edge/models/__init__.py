"""Which models: architectures, the demo model."""
