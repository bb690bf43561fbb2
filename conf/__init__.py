"""Hydra groups (YAML) and their typed schema. No logic beyond validation."""
