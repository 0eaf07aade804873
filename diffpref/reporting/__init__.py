"""The report that a run ends in, and the card of a saved model."""
