"""Layers, mixers and the causal language model. Models see ranks only through their context."""
