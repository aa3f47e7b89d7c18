"""How good a checkpoint is: the loss on a text, and multiple choice."""
