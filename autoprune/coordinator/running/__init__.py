"""One search: its session, its executors, its log and its end."""
