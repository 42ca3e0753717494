"""The service: the queue's runner, its children under a supervisor, the status page."""
