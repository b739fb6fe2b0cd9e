"""What the products of a linear layer read."""
