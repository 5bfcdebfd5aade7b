"""What a run says: frozen results, and their forms as text and files."""
