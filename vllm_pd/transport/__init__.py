"""Moving registered KV blocks between workers."""
