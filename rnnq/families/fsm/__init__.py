"""Sequence models that learn, from a few walks through an unknown automaton, how it goes on."""
