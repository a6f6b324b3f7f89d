"""LSTM language models at several widths: muP, learning rates that carry over, and what a FLOP buys."""
