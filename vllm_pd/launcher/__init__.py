"""From a topology to running processes: devices, start, supervision, state, stop.

``devices`` looks at the machine, ``split`` and ``planning`` decide (pure),
``supervisor`` runs the processes in the background, ``commands`` is what the
CLI calls. Engines are driven from outside: nothing here imports vLLM.
"""
