"""Training: the LightningModule, callbacks, runs, export."""
