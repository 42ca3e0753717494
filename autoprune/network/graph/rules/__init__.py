"""Rules: what each kind of operator does to channel labels, and the one table of them."""
