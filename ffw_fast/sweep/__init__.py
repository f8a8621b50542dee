"""Many extractions over a grid of settings: what is asked for, where it runs, and the table of what came out."""
