"""trainguard: guards PyTorch training against quiet sabotage.

For any PyTorch training run, with no change to its code, trainguard compares what is about to run with what was
approved, watches every step, vets and seals checkpoints, and keeps the evidence in a log that cannot be rewritten
unnoticed. The command line is the public surface; see README.md.
"""

__version__ = "0.1.0"
