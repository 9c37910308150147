"""Tasks: LightningModules that hold a network, its loss and its metrics."""
