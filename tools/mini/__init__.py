"""What made the built-in model: the grammar of its sentences, the synthesiser, the trainer. Not in the wheel."""
