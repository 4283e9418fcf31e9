"""Pictures of what a sparse model attends to."""
