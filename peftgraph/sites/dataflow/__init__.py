"""What one pass over a graph tells: operators, products, and which features arrive where."""
