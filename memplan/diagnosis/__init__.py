"""Out-of-memory texts explained: what happened, when, why, and what to change. No torch."""
