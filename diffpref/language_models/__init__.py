"""Models of transformers that read or write text, for captioners, perturbers and evaluators."""
