"""Runs of workloads in folders: asked for, run, written so that they can be taken up again, and read."""
