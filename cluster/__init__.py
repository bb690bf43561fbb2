"""Processes and machines, and the command that starts them."""
