"""What people use a finished model with: translating files."""
