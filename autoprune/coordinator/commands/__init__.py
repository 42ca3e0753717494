"""What the commands do, but for a search itself and the service."""
