"""What is stored of a search and of a service, read back: no model and no data are read."""
