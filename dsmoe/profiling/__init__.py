"""Traces of training steps: taking them, and reading where their time went."""
