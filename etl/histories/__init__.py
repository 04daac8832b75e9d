"""Users' events as arrays, on executors, without a shuffle."""
