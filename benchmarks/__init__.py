"""How fast commandbus is, beside what it could be at most, and beside its peers: `scripts/bench`."""
