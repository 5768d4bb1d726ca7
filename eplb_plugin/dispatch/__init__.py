"""Which replica serves which token."""
