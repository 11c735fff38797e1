"""Several processes of one router that share a port, and what they tell each other."""
