"""Continual adaptation: a user's tasks one after the other, rules that keep what was learned, and its bytes."""
