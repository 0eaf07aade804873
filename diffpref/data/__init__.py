"""Preference pairs: where they are, what they hold, in which order they are drawn."""
