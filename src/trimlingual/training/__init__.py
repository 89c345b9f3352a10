"""The training loop: batches, loss, adapters, optimizer, checkpoints, and when training stops being worth it."""
