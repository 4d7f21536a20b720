"""Metrics as pure functions: arrays or strings in, plain numbers out."""
