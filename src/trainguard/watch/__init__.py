"""DURING: what runs beside and inside the training.

Two sides that share only the frame format (spec/evidence.md):

- *Inside the training process*, loaded by file path under the name `_trainguard` by `boot/sitecustomize.py`:
  bootstrap, client, audit, engine and the links. They import the standard library, each other, and torch once the
  job itself has imported it. They record; they decide and sign nothing; they fail open.
- *Outside*, in the parent process: supervisor and spool. They add what the kernel attests, chain, seal and log.
"""
