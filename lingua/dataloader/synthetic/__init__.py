"""Synthetic tasks, generated during training: `data.task` in place of `data.sources`.

random.py           streams of random numbers, one per example
task.py             what a task is, and the split into training and held-out examples
args.py             options, and the task that they describe
stream.py           the batches of a data-parallel rank, with an exact state
state_tracking.py   and the other tasks, one file each
"""
