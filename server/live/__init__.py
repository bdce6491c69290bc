"""A federation over real nodes: its rounds, evaluations and announcements."""
