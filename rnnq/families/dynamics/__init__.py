"""Gated RNNs on bytes, trained without backpropagation through time."""
