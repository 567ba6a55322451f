"""megaopus: distributed GPT pre-training with online data selection built in."""

__version__ = "0.2.0"
