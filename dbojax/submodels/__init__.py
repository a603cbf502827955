"""Which part of x and y a client holds."""
