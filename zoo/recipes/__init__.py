"""Named LightningCLI configurations; each file is one runnable experiment."""
