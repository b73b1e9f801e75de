"""What crosses between engines and attention workers; both sides import it, and it imports neither."""
