"""Is the aligned policy better? Win rates under a gold that took no part in training."""
