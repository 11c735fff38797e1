"""Control-plane messages, states and checks. Pure: no I/O, no clock."""
