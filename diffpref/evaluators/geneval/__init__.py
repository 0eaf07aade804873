"""GenEval with other checkpoints: does an image show what its prompt names?"""
