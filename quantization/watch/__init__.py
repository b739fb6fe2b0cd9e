"""What is recorded of weights while a model trains."""
