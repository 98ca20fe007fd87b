"""Multi-reference preference alignment."""
