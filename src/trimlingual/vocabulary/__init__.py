"""The tokens that stay: which ones the target languages need, and the model without the others."""
