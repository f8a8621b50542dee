"""Networks beside each other, over seeds: FFW, BISE and what they are up against."""
