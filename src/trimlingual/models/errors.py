"""What can be wrong with a model."""


class ModelError(ValueError):
    """A model that cannot be used here; the message says what to do."""


class ProofError(RuntimeError):
    """A pruned model that is not what it should be: a defect of this tool or of a library, not of the input."""
