"""Measurements of the product's own code against plain alternatives, each ending in a record."""
