"""Is it worth it, and with which settings? What a recorded load says about traffic that is still to come."""
