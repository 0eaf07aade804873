"""A small world of coloured shapes with an exact judge, and the small Stable Diffusion trained on it."""
