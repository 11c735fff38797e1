"""Control channel: keys, sockets, the instance endpoint and the sessions of a worker."""
