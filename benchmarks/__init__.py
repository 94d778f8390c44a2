"""Ratios against peers, measured side by side: one file a question, `make bench` runs all."""
