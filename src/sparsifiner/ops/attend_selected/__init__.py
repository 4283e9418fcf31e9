"""Selection and attention in one operation, where nobody asks for the lists between them."""
