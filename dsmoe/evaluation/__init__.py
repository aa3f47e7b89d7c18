"""Measures of a checkpoint's quality: the loss on a text, and multiple choice."""
